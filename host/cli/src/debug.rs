//! `coracle debug`: a shell in a pod's guest, over the debug console.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coracle_machine::{AgentAddress, GuestStream};
use coracle_protocol::ports::DEBUG;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::terminal::{self, Raw};
use crate::{container, pods};

/// Open a shell in a pod's guest, or run one command there.
///
/// It is off unless the setting debug.console is true when the pod starts, and the guest image has a shell (`coracle image build --shell`). The shell is
/// root's in the guest, outside of all containers. A command's output and errors come together, and its exit code is this program's.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod, by its id, the beginning of that, or NAMESPACE/NAME of Kubernetes.
    pod: String,
    /// A command to run in the place of a shell, behind --.
    #[arg(last = true)]
    command: Vec<String>,
}

/// How long the guest may take to answer a connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long its shell may take to begin.
const BEGIN_PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn run(args: Args) -> Result<u8> {
    let (_, about) = pods::find(&args.pod).await?;
    let refused = || {
        format!(
            "the guest of {} has no debug console: set `console = true` in the table [debug] of /etc/coracle/config.toml, and start the pod again",
            about.id
        )
    };
    let connected =
        tokio::time::timeout(PATIENCE, connect(&about.agent)).await.map_err(|_| anyhow::anyhow!("no answer"));
    let stream = connected.and_then(|connected| connected).with_context(refused)?;
    if args.command.is_empty() { shell(stream).await } else { once(stream, &args.command).await }
}

async fn connect(agent: &str) -> Result<GuestStream> {
    let address = AgentAddress::of_url(agent).context("there is no machine yet")?;
    Ok(address.connect(DEBUG).await?)
}

/// A shell for the person at this terminal.
async fn shell(stream: GuestStream) -> Result<u8> {
    let raw = Raw::enter().context("a shell needs a terminal: give a command behind --")?;
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    if let Some((columns, rows)) = terminal::size() {
        to_guest.write_all(format!(" stty columns {columns} rows {rows}\n").as_bytes()).await?;
    }
    let input = tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let _ = tokio::io::copy(&mut stdin, &mut to_guest).await;
    });
    let mut stdout = tokio::io::stdout();
    let copied = tokio::io::copy(&mut from_guest, &mut stdout).await;
    input.abort();
    drop(raw);
    copied.context("the guest's shell")?;
    Ok(0)
}

/// Runs a command and gives its exit code. What the shell echoes of it is told from what it prints by a word that only stands whole in the latter.
async fn once(mut stream: GuestStream, command: &[String]) -> Result<u8> {
    let mark = container::new_id()?;
    let (first, last) = mark.split_at(mark.len() / 2);
    let words: Vec<_> = command.iter().map(|word| quoted(word)).collect();
    let line = format!(
        " stty -echo; printf '%s%s\\n' {first} {last}; {{ {}; }} </dev/null; printf '\\n%s%s %d\\n' {last} {first} $?; exit\n",
        words.join(" ")
    );
    // An agent that has no shell may have hung up already: what it said is still there to be read.
    let written = stream.write_all(line.as_bytes()).await;
    let (begin, end) = (format!("{first}{last}\n"), format!("\n{last}{first} "));
    let mut printer = Printer { text: Vec::new(), begin, end, has_begun: false };
    let mut chunk = [0; 8192];
    let begins_by = tokio::time::Instant::now() + BEGIN_PATIENCE;
    loop {
        let read = stream.read(&mut chunk);
        let count = if printer.has_begun {
            read.await.context("the guest's shell")?
        } else {
            let waited = tokio::time::timeout_at(begins_by, read).await;
            waited.context("the guest's shell does not begin")?.context("the guest's shell")?
        };
        printer.text.extend(chunk[..count].iter().filter(|byte| **byte != b'\r'));
        if let Some(code) = printer.print()? {
            return Ok(code);
        }
        if count == 0 {
            if printer.text.is_empty() {
                written.context("the guest's shell")?;
            }
            bail!("the guest's shell ended before the command: {}", String::from_utf8_lossy(&printer.text).trim());
        }
    }
}

/// How much is kept of what comes before a command begins, in bytes.
const KEPT_BYTES: usize = 1024;

/// Prints what stands between two marks.
struct Printer {
    text: Vec<u8>,
    begin: String,
    end: String,
    has_begun: bool,
}

fn position(text: &[u8], word: &str) -> Option<usize> {
    text.windows(word.len()).position(|window| window == word.as_bytes())
}

impl Printer {
    /// Prints what has come; the command's exit code once that has come, too.
    fn print(&mut self) -> Result<Option<u8>> {
        if !self.has_begun {
            let Some(at) = position(&self.text, &self.begin) else {
                // Only what may be its beginning is kept, and what the agent may have said in its place.
                self.text.drain(..self.text.len().saturating_sub(KEPT_BYTES.max(self.begin.len())));
                return Ok(None);
            };
            self.text.drain(..at + self.begin.len());
            self.has_begun = true;
        }
        let (whole, code) = match position(&self.text, &self.end) {
            Some(at) => {
                let rest = &self.text[at + self.end.len()..];
                let Some(line) = rest.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
                let code = String::from_utf8_lossy(&rest[..line]).trim().parse().context("the command's exit code")?;
                (at, Some(code))
            }
            // The end may have begun.
            None => (self.text.len().saturating_sub(self.end.len()), None),
        };
        let mut stdout = std::io::stdout();
        stdout.write_all(&self.text[..whole]).and_then(|()| stdout.flush()).context("print the output")?;
        self.text.drain(..whole);
        Ok(code)
    }
}

/// A word as a shell reads it as one.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_code_are_found_in_pieces() {
        let mut printer = Printer { text: Vec::new(), begin: "ab\n".into(), end: "\nba ".into(), has_begun: false };
        let mut codes = Vec::new();
        for piece in ["# printf %s%s a b\n", "ab", "\nout", "put\n\nb", "a 7", "\nexit"] {
            printer.text.extend(piece.as_bytes());
            codes.push(printer.print().unwrap());
        }
        assert_eq!(codes, [None, None, None, None, None, Some(7)]);
        assert_eq!(quoted("a'b c"), "'a'\\''b c'");
    }
}
