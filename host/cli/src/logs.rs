//! `coracle logs`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::container::Root;
use crate::task::Task;

/// Show what a detached container has printed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container: its name or id.
    container: String,
    /// Go on until the container ends.
    #[arg(short, long)]
    follow: bool,
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<()> {
    let (folder, record) = root.find(&args.container)?;
    if !record.detached {
        bail!("{} was not detached: it printed to its own terminal", record.name);
    }
    let mut outputs = [Output::new(&folder.join("stdout.log")), Output::new(&folder.join("stderr.log"))];
    if args.follow
        && let Ok(task) = Task::connect(&record).await
    {
        let ended = task.wait("");
        tokio::pin!(ended);
        // The files grow without saying so: this looks four times a second, for a person's eyes.
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(250));
        loop {
            tokio::select! {
                _ = &mut ended => break,
                _ = tick.tick() => show(&mut outputs)?,
            }
        }
    }
    show(&mut outputs)
}

struct Output(Option<File>);

impl Output {
    fn new(path: &Path) -> Self {
        Self(File::open(path).ok())
    }
}

fn show(outputs: &mut [Output; 2]) -> Result<()> {
    let copy = |output: &mut Output, to: &mut dyn Write| {
        let Some(file) = &mut output.0 else { return Ok(()) };
        let mut chunk = Vec::new();
        file.read_to_end(&mut chunk).context("read the log")?;
        to.write_all(&chunk).and_then(|()| to.flush()).context("print the log")
    };
    let [stdout, stderr] = outputs;
    copy(stdout, &mut std::io::stdout())?;
    copy(stderr, &mut std::io::stderr())
}
