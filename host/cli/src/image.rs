//! `coracle image build`: the guest's kernel and initrd.

use std::path::{Path, PathBuf};
use std::process::Command as Process;

use anyhow::{Context, Result, bail};
use coracle_guest_image::Package;

use crate::{place, table};

/// The package whose dependency is the newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Guest images.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make the guest image from a kernel package of the distribution and our agent.
    Build(Build),
    /// Say what a guest image is: its kernel, its agent's version, its digests.
    Inspect {
        /// The image's folder; the one in use where none is named.
        folder: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read a guest image and compare it with what its manifest says.
    Verify {
        /// The image's folder; the one in use where none is named.
        folder: Option<PathBuf>,
        /// Print the image's manifest as JSON where all is as that says.
        #[arg(long)]
        json: bool,
    },
}

/// Make the guest image.
#[derive(Debug, clap::Args)]
pub(crate) struct Build {
    /// The kernel package: a .deb file, or a package's name for apt.
    #[arg(long, default_value = KERNEL, value_name = "FILE|NAME")]
    kernel: String,
    /// The agent's program; it is looked for beside this one.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// A static busybox for `coracle debug`, such as /bin/busybox of the package busybox-static. Without one the image has no shell.
    #[arg(long, value_name = "FILE")]
    shell: Option<PathBuf>,
    /// Print the image's manifest as JSON.
    #[arg(long)]
    json: bool,
    /// Where the image goes: /var/lib/coracle/guest for root, ~/.local/share/coracle/guest for others.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Build(args) => build(args),
        Command::Inspect { folder, json } => inspect(folder, json),
        Command::Verify { folder, json } => verify(folder, json),
    }
}

impl Build {
    /// The usual image, with this agent.
    pub(crate) fn of_agent(agent: PathBuf) -> Self {
        Self { kernel: KERNEL.into(), agent: Some(agent), shell: None, json: false, output: None }
    }
}

pub(crate) fn build(args: Build) -> Result<()> {
    let agent = agent(args.agent)?;
    let downloads = Downloads::new()?;
    let file = if args.kernel.contains('/') || args.kernel.ends_with(".deb") {
        PathBuf::from(&args.kernel)
    } else {
        eprintln!("coracle: fetching the kernel package {}", args.kernel);
        downloads.fetch(&args.kernel)?
    };
    eprintln!("coracle: reading {}", file.display());
    let package = Package::open(&file)?;
    let output = args.output.map_or_else(place::guest, Ok)?;
    let manifest = coracle_guest_image::build(&package, &agent, args.shell.as_deref(), &output)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
        return Ok(());
    }
    println!("{}: kernel {}, agent {}", output.display(), manifest.kernel_release, manifest.version);
    Ok(())
}

fn inspect(folder: Option<PathBuf>, json: bool) -> Result<()> {
    let folder = folder.map_or_else(place::guest_in_use, Ok)?;
    let manifest = coracle_guest_image::read_manifest(&folder)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
        return Ok(());
    }
    let size = |name: &str| {
        std::fs::metadata(folder.join(name)).map_or_else(|error| error.to_string(), |file| table::size(file.len()))
    };
    println!("folder   {}", folder.display());
    println!("agent    {}", manifest.version);
    println!(
        "kernel   {} ({}, SHA-256 {})",
        manifest.kernel_release,
        size(coracle_guest_image::KERNEL),
        manifest.kernel_sha256
    );
    println!("initrd   {} (SHA-256 {})", size(coracle_guest_image::INITRD), manifest.initrd_sha256);
    Ok(())
}

fn verify(folder: Option<PathBuf>, json: bool) -> Result<()> {
    let folder = folder.map_or_else(place::guest_in_use, Ok)?;
    let manifest = coracle_guest_image::verify(&folder)?;
    if manifest.version != coracle_protocol::VERSION {
        bail!(
            "{}: the agent is version {}, and this program {}: run `coracle image build`",
            folder.display(),
            manifest.version,
            coracle_protocol::VERSION
        );
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&manifest)?);
    } else {
        println!("{}: kernel and initrd are what the manifest says", folder.display());
    }
    Ok(())
}

/// The agent's program: the given one, or that beside this program or where it is installed.
pub(crate) fn agent(given: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path);
    }
    let own = std::env::current_exe().and_then(|own| own.canonicalize()).context("find this program")?;
    let beside = own.with_file_name("coracle-agent");
    let below = own.parent().and_then(Path::parent).map(|prefix| prefix.join("lib/coracle/coracle-agent"));
    let installed = Path::new("/usr/lib/coracle/coracle-agent").to_owned();
    [Some(beside), below, Some(installed)].into_iter().flatten().find(|path| path.exists()).context(
        "the agent's program is neither beside coracle nor at /usr/lib/coracle/coracle-agent: name it with --agent",
    )
}

/// A folder for downloads, removed at the end.
struct Downloads(PathBuf);

impl Downloads {
    fn new() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("coracle-image-{}", std::process::id()));
        std::fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(Self(folder))
    }

    /// Downloads a package, or what a package without files depends on, with apt.
    fn fetch(&self, name: &str) -> Result<PathBuf> {
        let name = concrete(name)?;
        let status = Process::new("apt-get")
            // As root, apt would drop to a user who may not write here, and complain.
            .args(["-q", "-o", "APT::Sandbox::User=root", "download", &name])
            .current_dir(&self.0)
            .stdout(std::process::Stdio::null())
            .status()
            .context("start apt-get: give --kernel FILE on a system without it")?;
        if !status.success() {
            bail!("apt-get could not download {name}: run `apt-get update`, or give --kernel FILE");
        }
        let found = std::fs::read_dir(&self.0)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
        found.with_context(|| format!("apt-get downloaded no package {name}"))
    }
}

impl Drop for Downloads {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The package with files behind one that only depends on it.
fn concrete(name: &str) -> Result<String> {
    let output =
        Process::new("apt-cache").args(["depends", "--important", name]).output().context("start apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let dependency = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|dependency| dependency.starts_with("linux-image-") && dependency.contains('.'));
    Ok(dependency.unwrap_or(name).to_owned())
}
