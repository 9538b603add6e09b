//! What tests need inside a guest, and busybox has not.
//!
//! `guest-probe vsock PORT BYTES`: connects to the host's vsock port and writes BYTES bytes (each its index modulo 251) in
//! one call. It says how many the call took. `guest-probe get ADDRESS:PORT PATH`: prints what an HTTP server answers.
//! As a guest's `/init` it prints the guest's clock at its first instruction, and waits.
//! `guest-probe read FILE BYTES`, `random FILE COUNT` (reads of 4 KiB), `random-write FILE COUNT`, `write FILE BYTES`, `files FOLDER COUNT` (made, looked at,
//! removed): how many microseconds it takes.
//! `guest-probe serve PORT COUNT` serves so many connections of the two that follow, one at a time, and says "serves" first.
//! `guest-probe stream ADDRESS:PORT BYTES` sends bytes until all have been read, `guest-probe pings ADDRESS:PORT COUNT` sends a byte and
//! waits for one, again and again: how many microseconds it takes.
//! `guest-probe unix serve PATH` says "serves", and answers one line at that socket; `guest-probe unix ask PATH` sends one and prints the answer.
//! `guest-probe watch FOLDER NAME`: says "watching", and the name when something was moved to it in that folder (inotify).
//! `guest-probe call NAME ARGUMENT`: makes a system call (keyctl, getpid), and prints "ok" or the kernel's refusal.

mod net;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    // The first process of a container is another one.
    if std::process::id() == 1 && words.first().is_some_and(|name| name == "/init") {
        return as_init();
    }
    let [_, verb, first, second] = words.as_slice() else { return usage() };
    let outcome = match (verb.as_str(), first.parse::<u32>(), second.parse::<usize>()) {
        ("vsock", Ok(port), Ok(bytes)) => write_once(port, bytes).map(|taken| taken.to_string()),
        ("get", _, _) => get(first, second),
        ("watch", _, _) => watch(first, second),
        ("unix", _, _) if first == "serve" => net::serve_unix(second),
        ("unix", _, _) if first == "ask" => net::ask_unix(second),
        ("serve", Ok(port), Ok(count)) => net::serve(port, count),
        ("stream", _, Ok(bytes)) => net::stream(first, bytes),
        ("pings", _, Ok(count)) => net::pings(first, count),
        ("call", _, Ok(argument)) => call(first, argument),
        ("read" | "random" | "random-write" | "write" | "files", _, Ok(count)) => timed(verb, Path::new(first), count),
        _ => return usage(),
    };
    match outcome {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("guest-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Says how long the guest has been running, in microseconds, and stays: the end of the first process is a panic.
fn as_init() -> ExitCode {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live variable of the type that the call writes.
    #[expect(unsafe_code, reason = "the clock since boot")]
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    println!("guest-probe: init after {} us ({result})", time.tv_sec * 1_000_000 + time.tv_nsec / 1000);
    loop {
        std::thread::park();
    }
}

/// Waits until something was moved to `name` in `folder`.
fn watch(folder: &str, name: &str) -> std::io::Result<String> {
    use std::os::fd::{FromRawFd, OwnedFd};
    let folder = std::ffi::CString::new(folder)?;
    // SAFETY: the call takes no pointer.
    #[expect(unsafe_code, reason = "a call that libc has")]
    let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it, and nobody else has it.
    #[expect(unsafe_code, reason = "a number becomes what owns it")]
    let watch = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the path is NUL-terminated and lives through the call.
    #[expect(unsafe_code, reason = "a call that libc has")]
    let added = unsafe { libc::inotify_add_watch(fd, folder.as_ptr(), libc::IN_MOVED_TO) };
    if added < 0 {
        return Err(std::io::Error::last_os_error());
    }
    println!("watching");
    let mut watch = File::from(watch);
    let mut bytes = [0; 4096];
    loop {
        let count = watch.read(&mut bytes)?;
        // The name is behind the figures, with zeros behind it.
        if bytes.get(..count).is_some_and(|events| events.windows(name.len()).any(|part| part == name.as_bytes())) {
            return Ok(name.to_owned());
        }
    }
}

/// One request of HTTP 1.0; the whole answer.
fn get(address: &str, path: &str) -> std::io::Result<String> {
    let address: std::net::SocketAddr = address.parse().map_err(std::io::Error::other)?;
    let mut stream = std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(20))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Microseconds of something that is done to files.
fn timed(verb: &str, path: &Path, count: usize) -> std::io::Result<String> {
    let start = std::time::Instant::now();
    match verb {
        "read" => read(path, count)?,
        "random" => random(path, count, false)?,
        "random-write" => random(path, count, true)?,
        "write" => write(path, count)?,
        _ => files(path, count)?,
    }
    Ok(start.elapsed().as_micros().to_string())
}

/// The size of one read or write, in bytes.
const PIECE: usize = 1 << 20;

fn read(path: &Path, bytes: usize) -> std::io::Result<()> {
    let (mut file, mut piece) = (File::open(path)?, vec![0; PIECE]);
    for _ in 0..bytes / PIECE {
        file.read_exact(&mut piece)?;
    }
    Ok(())
}

/// Pages of a file, or of a disk, in an order of no pattern: read, or written and then kept.
fn random(path: &Path, count: usize, is_write: bool) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(is_write).open(path)?;
    let (pages, mut page) = (file.seek(SeekFrom::End(0))? / 4096, [1; 4096]);
    let mut state = 1_u64;
    for _ in 0..count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 20) % pages.max(1) * 4096;
        if is_write {
            file.write_all_at(&page, at)?;
        } else {
            file.read_exact_at(&mut page, at)?;
        }
    }
    if is_write { file.sync_all() } else { Ok(()) }
}

fn write(path: &Path, bytes: usize) -> std::io::Result<()> {
    let (mut file, piece) = (File::create(path)?, vec![1; PIECE]);
    for _ in 0..bytes / PIECE {
        file.write_all(&piece)?;
    }
    file.sync_all()
}

fn files(folder: &Path, count: usize) -> std::io::Result<()> {
    std::fs::create_dir(folder)?;
    let all = || (0..count).map(|number| folder.join(number.to_string()));
    for path in all() {
        File::create(path)?.write_all(b"small")?;
    }
    for path in all() {
        std::fs::metadata(path)?;
    }
    for path in all() {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

fn usage() -> ExitCode {
    eprintln!(
        "usage: guest-probe vsock PORT BYTES | get ADDRESS:PORT PATH | call NAME ARGUMENT | read FILE BYTES | random FILE COUNT | \
         random-write FILE COUNT | write FILE BYTES | files FOLDER COUNT | serve PORT COUNT | stream ADDRESS:PORT BYTES | \
         pings ADDRESS:PORT COUNT | unix serve|ask PATH | watch FOLDER NAME"
    );
    ExitCode::from(2)
}

/// One system call.
fn call(name: &str, argument: usize) -> std::io::Result<String> {
    let number = match name {
        "keyctl" => libc::SYS_keyctl,
        "getpid" => libc::SYS_getpid,
        other => return Err(std::io::Error::other(format!("the call {other} is not known here"))),
    };
    // SAFETY: neither call takes a pointer; a wrong argument is answered with an error.
    #[expect(unsafe_code, reason = "the call under test")]
    let result = unsafe { libc::syscall(number, argument, 0, 0, 0, 0) };
    Ok(if result < 0 { std::io::Error::last_os_error().to_string() } else { "ok".into() })
}

fn write_once(port: u32, bytes: usize) -> std::io::Result<isize> {
    let data: Vec<u8> = (0..bytes).map(|index| u8::try_from(index % 251).unwrap_or(0)).collect();
    // SAFETY: an all-zero sockaddr_vm is a valid value of that plain C structure.
    #[expect(unsafe_code, reason = "a C structure")]
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address and the data live through the calls, and the lengths are theirs.
    #[expect(unsafe_code, reason = "the calls under test, as a C program makes them")]
    let result = unsafe {
        let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
        if socket < 0 || libc::connect(socket, (&raw const address).cast(), length) < 0 {
            return Err(std::io::Error::last_os_error());
        }
        libc::write(socket, data.as_ptr().cast(), data.len())
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}
