//! A private containerd: started for one task, stopped with it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::build::Built;
use crate::image;
use crate::steps::run;

/// It is stopped, and its folders removed, when this is dropped.
pub(crate) struct Containerd {
    child: Child,
    folder: PathBuf,
}

impl Containerd {
    /// Starts it with our shim in its `$PATH`, and waits until it serves.
    pub(crate) fn start(built: &Built, settings: &Path) -> Result<Self> {
        // Sockets' paths are short.
        let folder = PathBuf::from(format!("/run/coracle-xtask-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let text = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/c.sock\"\n",
            folder.display()
        );
        let config = folder.join("config.toml");
        std::fs::write(&config, text).context("write containerd's configuration")?;
        let shims = built.shim().parent().map(Path::to_owned).unwrap_or_default();
        let path = format!("{}:{}", shims.display(), std::env::var("PATH").unwrap_or_default());
        let mut child = Command::new("containerd")
            .arg("-c")
            .arg(&config)
            .env("PATH", path)
            .env("CORACLE_CONFIG", settings)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start containerd")?;
        let stderr = child.stderr.take().context("containerd has no output")?;
        let mut lines = BufReader::new(stderr).lines();
        let mut last = String::new();
        for line in lines.by_ref().map_while(Result::ok) {
            if line.contains("containerd successfully booted") {
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(Self { child, folder });
            }
            last = line;
        }
        let status = child.wait()?;
        bail!("containerd ended with {status}: {last}")
    }

    /// Gives it an image that lies in a folder; its name there.
    pub(crate) fn import(&self, image: &Path, work: &Path) -> Result<String> {
        let archive = work.join("image.tar");
        image::archive(image, &archive)?;
        let mut import =
            self.ctr(&["images", "import", "--base-name", "coracle-xtask", &archive.display().to_string()]);
        import.stdout(Stdio::null());
        run(import)?;
        Ok("coracle-xtask:latest".to_owned())
    }

    /// A `ctr` command on it.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.folder.join("c.sock")).args(arguments);
        command
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
