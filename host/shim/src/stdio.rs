//! Standard streams as containerd names them: a pipe's path, `file://PATH`, or `binary://PROGRAM?ARG=VALUE`.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, Stdio as ChildStdio};
use std::task::{Context, Poll};
use std::time::Duration;

use coracle_sandbox::{Error, Input, Output, Stdio};
use tokio::io::AsyncWrite;
use tokio::net::unix::pipe;

type Result<T> = std::result::Result<T, Error>;

/// Opens the streams of a process. Empty texts are absent streams.
pub(crate) async fn open(
    stdin: &str,
    stdout: &str,
    stderr: &str,
    terminal: bool,
    names: (&str, &str),
) -> Result<Stdio> {
    let input = if stdin.is_empty() { None } else { Some(open_input(stdin)?) };
    if stdout.starts_with("binary://") {
        let (stdout, stderr) = start_logger(stdout, names).await?;
        return Ok(Stdio { stdin: input, stdout: Some(stdout), stderr: Some(stderr), terminal });
    }
    let output = |uri: &str| if uri.is_empty() { Ok(None) } else { open_output(uri).map(Some) };
    Ok(Stdio { stdin: input, stdout: output(stdout)?, stderr: if terminal { None } else { output(stderr)? }, terminal })
}

fn failed(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.to_owned();
    move |error| Error::Failed(format!("open the stream {what}: {error}"))
}

/// A pipe to read. A writer of our own keeps it from ending between two clients; closing the input drops it.
fn open_input(path: &str) -> Result<Input> {
    let path = path.strip_prefix("file://").unwrap_or(path);
    let file = open_file(path, false)?;
    if !is_fifo(&file) {
        return Ok(Input { stream: Box::pin(tokio::fs::File::from_std(file)), keeper: None });
    }
    let receiver = pipe::Receiver::from_file(file).map_err(failed(path))?;
    let keeper =
        std::fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed(path))?;
    Ok(Input { stream: Box::pin(receiver), keeper: Some(Box::new(keeper)) })
}

/// A pipe or file to write. A pipe is held open for reading too, so that a client may go and another one come.
fn open_output(uri: &str) -> Result<Output> {
    if let Some(path) = uri.strip_prefix("file://") {
        if let Some(folder) = Path::new(path).parent() {
            std::fs::create_dir_all(folder).map_err(failed(path))?;
        }
        let file =
            std::fs::OpenOptions::new().append(true).create(true).mode(0o640).open(path).map_err(failed(path))?;
        return Ok(Box::pin(tokio::fs::File::from_std(file)));
    }
    if uri.contains("://") {
        return Err(Error::Unsupported(format!("streams of the form {uri} are not supported")));
    }
    let file = open_file(uri, true)?;
    if is_fifo(&file) {
        return Ok(Pipe::output(pipe::Sender::from_file(file).map_err(failed(uri))?));
    }
    Ok(Box::pin(tokio::fs::File::from_std(file)))
}

/// How often a pipe that is at its end is looked at for bytes that were not taken yet: that it is empty is no event.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// The writing end of a pipe, whose shutdown is done when it is empty.
struct Pipe {
    sender: pipe::Sender,
    look_again: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Pipe {
    fn output(sender: pipe::Sender) -> Output {
        Box::pin(Self { sender, look_again: None })
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.sender).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        while rustix::io::ioctl_fionread(&self.sender)? > 0 {
            let timer = self.look_again.get_or_insert_with(|| Box::pin(tokio::time::sleep(LOOK_AGAIN)));
            std::task::ready!(timer.as_mut().poll(context));
            self.look_again = None;
        }
        Poll::Ready(Ok(()))
    }
}

/// A pipe that is open for both directions neither waits for its other end nor breaks without it.
fn open_file(path: &str, write: bool) -> Result<std::fs::File> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_NONBLOCK);
    options.open(path).map_err(failed(path))
}

fn is_fifo(file: &std::fs::File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Starts a logging program (containerd: runtime/v2/README.md, "Logging"): standard output comes to it on descriptor 3,
/// error output on 4, and it closes descriptor 5 when it is ready.
async fn start_logger(uri: &str, (id, namespace): (&str, &str)) -> Result<(Output, Output)> {
    let rest = uri.strip_prefix("binary://").unwrap_or(uri);
    let (program, query) = rest.split_once('?').unwrap_or((rest, ""));
    let arguments = query.split('&').filter(|pair| !pair.is_empty()).flat_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        [decode(key), decode(value)].into_iter().filter(|word| !word.is_empty())
    });
    let make = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| failed(uri)(error.into()));
    let ((out_read, out_write), (err_read, err_write), (ready_read, ready_write)) = (make()?, make()?, make()?);
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(ChildStdio::null())
        .stdout(ChildStdio::null())
        .stderr(ChildStdio::null());
    let sources = [&out_read, &err_read, &ready_write].map(std::os::fd::AsRawFd::as_raw_fd);
    let place = move || {
        // Copies above all targets first: a target may be the number of a source that is still to be copied.
        let mut copies = [-1; 3];
        for (copy, source) in copies.iter_mut().zip(sources) {
            // SAFETY: the call takes no pointers; a bad descriptor is answered with EBADF.
            #[expect(unsafe_code, reason = "the safe wrappers own the copy, which here is only a number")]
            let result = unsafe { libc::fcntl(source, libc::F_DUPFD_CLOEXEC, 16) };
            *copy = result;
        }
        for (copy, target) in copies.into_iter().zip(3..) {
            // SAFETY: as above; the target's number is this child's own, and what was there closes.
            #[expect(unsafe_code, reason = "the safe wrappers own the target, which here is only a number")]
            let result = unsafe { libc::dup2(copy, target) };
            if result < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes fcntl and dup2 calls only, which are async-signal-safe.
    #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
    unsafe {
        command.pre_exec(place);
    }
    let mut child = command.spawn().map_err(failed(uri))?;
    drop((out_read, err_read, ready_write));
    // The logger ends at the end of its input; a thread of its own reaps it, which costs nothing while it sleeps.
    std::thread::Builder::new()
        .stack_size(32 * 1024)
        .spawn(move || {
            let _ = child.wait();
        })
        .map_err(failed(uri))?;
    let sender = |fd: OwnedFd| {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| failed(uri)(error.into()))?;
        pipe::Sender::from_owned_fd(fd).map_err(failed(uri))
    };
    rustix::io::ioctl_fionbio(&ready_read, true).map_err(|error| failed(uri)(error.into()))?;
    let ready = pipe::Receiver::from_owned_fd(ready_read).map_err(failed(uri))?;
    // Readable at its end too: ready, or gone, in which case the writes will say so.
    ready.readable().await.map_err(failed(uri))?;
    Ok((Pipe::output(sender(out_write)?), Pipe::output(sender(err_write)?)))
}

/// Percent and plus signs of a query.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let number = std::str::from_utf8(&digits)
                    .ok()
                    .filter(|digits| digits.len() == 2)
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok());
                bytes.extend(number);
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const NAMES: (&str, &str) = ("c", "n");

    #[tokio::test]
    async fn a_pipe_outlives_its_clients() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let uri = path.to_str().unwrap();
        let mut stdio = open("", uri, "", false, NAMES).await.unwrap();
        stdio.stdout.as_mut().unwrap().write_all(b"one").await.unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let mut bytes = [0; 3];
        reader.read_exact(&mut bytes).await.unwrap();
        drop(reader);
        stdio.stdout.as_mut().unwrap().write_all(b"two").await.unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        reader.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"two");
    }

    #[tokio::test]
    async fn a_pipe_is_done_when_it_was_read_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut output = open("", path.to_str().unwrap(), "", false, NAMES).await.unwrap().stdout.unwrap();
        output.write_all(b"last words").await.unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let mut bytes = [0; 5];
        reader.read_exact(&mut bytes).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(50), output.shutdown()).await;
        assert!(early.is_err(), "half of it is still there");
        reader.read_exact(&mut bytes).await.unwrap();
        output.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn input_ends_when_it_is_closed_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut input = open(path.to_str().unwrap(), "", "", false, NAMES).await.unwrap().stdin.unwrap();
        std::fs::write(&path, "hello").unwrap();
        let mut bytes = [0; 5];
        input.stream.read_exact(&mut bytes).await.unwrap();
        // The writer has gone, and the input has not ended.
        let waited = tokio::time::timeout(std::time::Duration::from_millis(50), input.stream.read(&mut bytes)).await;
        assert!(waited.is_err());
        drop(input.keeper);
        assert_eq!(input.stream.read(&mut bytes).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn files_are_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/log");
        std::fs::create_dir(folder.path().join("deep")).unwrap();
        std::fs::write(&path, "a").unwrap();
        let mut stdio = open("", &format!("file://{}", path.display()), "", false, NAMES).await.unwrap();
        let output = stdio.stdout.as_mut().unwrap();
        output.write_all(b"b").await.unwrap();
        output.flush().await.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "ab");
        assert!(open("", "carrier-pigeon://x", "", false, NAMES).await.is_err());
        assert!(open("", "/nowhere/pipe", "", false, NAMES).await.unwrap_err().to_string().contains("/nowhere/pipe"));
    }

    #[tokio::test]
    async fn a_logger_gets_both_streams() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("logger");
        let result = folder.path().join("result");
        let text = format!(
            "#!/bin/sh\nexec 5>&-\ncat <&3 >{0}\ncat <&4 >>{0}\necho $CONTAINER_ID $1 $2 >>{0}.done\n",
            result.display()
        );
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let uri = format!("binary://{}?key=a%20b", script.display());
        let stdio = open("", &uri, &uri, false, NAMES).await.unwrap();
        for (stream, text) in [(stdio.stdout, "out"), (stdio.stderr, "err")] {
            stream.unwrap().write_all(text.as_bytes()).await.unwrap();
        }
        let done = folder.path().join("result.done");
        while std::fs::read_to_string(&done).unwrap_or_default() != "c key a b\n" {
            tokio::task::yield_now().await;
        }
        assert_eq!(std::fs::read_to_string(&result).unwrap(), "outerr");
    }

    #[test]
    fn queries_are_decoded() {
        assert_eq!(decode("a%2Fb+c%zz%4"), "a/b c");
    }
}
