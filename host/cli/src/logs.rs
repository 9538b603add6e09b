//! `coracle logs`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result, bail};
use tokio::time::Interval;

use crate::container::{Folder, Root};
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
    let mut outputs = Outputs::new(&folder);
    if args.follow
        && let Ok(task) = Task::connect(&record).await
    {
        let ended = task.wait("");
        tokio::pin!(ended);
        loop {
            tokio::select! {
                _ = &mut ended => break,
                () = outputs.tick() => outputs.show()?,
            }
        }
    }
    outputs.show()
}

/// The files that hold what a detached container prints.
pub(crate) struct Outputs {
    stdout: Option<File>,
    stderr: Option<File>,
    tick: Interval,
}

impl Outputs {
    pub(crate) fn new(folder: &Folder) -> Self {
        let open = |name: &str| File::open(folder.join(name)).ok();
        // The files grow without saying so: this looks four times a second, for a person's eyes.
        let tick = tokio::time::interval(std::time::Duration::from_millis(250));
        Self { stdout: open("stdout.log"), stderr: open("stderr.log"), tick }
    }

    /// Leaves out what there is.
    pub(crate) fn skip(&mut self) -> Result<()> {
        for file in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            file.seek(SeekFrom::End(0)).context("read the log")?;
        }
        Ok(())
    }

    /// Waits until it is time to look again.
    pub(crate) async fn tick(&mut self) {
        self.tick.tick().await;
    }

    /// Prints what has come.
    pub(crate) fn show(&mut self) -> Result<()> {
        let copy = |file: &mut Option<File>, to: &mut dyn Write| {
            let Some(file) = file else { return Ok(()) };
            let mut chunk = Vec::new();
            file.read_to_end(&mut chunk).context("read the log")?;
            to.write_all(&chunk).and_then(|()| to.flush()).context("print the log")
        };
        copy(&mut self.stdout, &mut std::io::stdout())?;
        copy(&mut self.stderr, &mut std::io::stderr())
    }
}
