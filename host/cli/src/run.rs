//! `coracle run`.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use coracle_cni::Port;
use coracle_images::{RegistryOptions, Source, Store};
use coracle_settings::Settings;

use crate::attach::Attachment;
use crate::container::{self, Folder, Record, Root};
use crate::task::Task;
use crate::{network, rootfs, shim, spec, supervise};

/// Run a command in a new container.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE or a registry reference.
    image: String,
    /// The command; the image's own where none is given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
    /// Pass standard input on.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set a variable: NAME=VALUE, or NAME to pass the caller's on.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// The working directory.
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The user, and a group: names or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Show a file or folder of the host in the container.
    #[arg(short, long, value_name = "SRC:DST[:ro]")]
    pub(crate) volume: Vec<String>,
    /// The network: bridge (addresses behind the host's own), user (one that needs no root), none, or the name of a CNI network. Not
    /// given, it is user for an ordinary user's container, and for root's what the setting network.default says: bridge, where
    /// nobody has changed it.
    #[arg(long, value_name = "NAME")]
    pub(crate) network: Option<String>,
    /// Let a port of the host lead to one of the container.
    #[arg(short, long, value_name = "[ADDRESS:]HOST:CONTAINER[/udp]")]
    pub(crate) publish: Vec<Port>,
    /// Processors that the container may use.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<f64>,
    /// Memory that the container may use: 256m, 1g.
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<String>,
    /// The machine: builtin (Coracle's own monitor, which needs KVM), qemu (a PC), or qemu-microvm.
    #[arg(long, value_name = "NAME")]
    hypervisor: Option<String>,
    /// The container's name; an id is made where none is given.
    #[arg(long)]
    name: Option<String>,
    /// Remove the container when it has ended.
    #[arg(long)]
    rm: bool,
    /// Leave it running in the background and print its id.
    #[arg(short, long)]
    detach: bool,
    /// The platform of the image: OS/ARCHITECTURE.
    #[arg(long, default_value = "linux/amd64", value_name = "PLATFORM")]
    platform: String,
    /// Speak to the registry without TLS.
    #[arg(long)]
    plain_http: bool,
}

/// How long a container that was given up may take to go.
const CLEANUP_PATIENCE: Duration = Duration::from_secs(30);

fn overrides(hypervisor: Option<&str>) -> Result<String> {
    match hypervisor {
        None => Ok(String::new()),
        Some("builtin") => Ok("machine.monitor = \"builtin\"".into()),
        Some("qemu") => Ok("machine.monitor = \"qemu\"\nmachine.type = \"q35\"".into()),
        Some("qemu-microvm") => Ok("machine.monitor = \"qemu\"\nmachine.type = \"microvm\"".into()),
        Some(other) => bail!("--hypervisor {other}: there is builtin, qemu and qemu-microvm"),
    }
}

/// Says which accelerator will run the container, and warns of emulation.
fn accelerator(overrides: &str) -> Result<String> {
    let report = shim::probe(overrides)?;
    if report["accelerator"]["ok"] != true {
        bail!("{}", report["accelerator"]["problem"].as_str().unwrap_or("no accelerator"));
    }
    if report["monitor"]["ok"] != true {
        bail!("{}", report["monitor"]["problem"].as_str().unwrap_or("no monitor"));
    }
    let name = report["accelerator"]["name"].as_str().unwrap_or("unknown").to_owned();
    if name != "kvm" {
        let reason = report["kvm"]["reason"].as_str().unwrap_or("the settings ask for it");
        eprintln!("coracle: warning: this machine is emulated, which is slow and no security boundary ({reason})");
    }
    Ok(name)
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<u8> {
    if args.detach && (args.interactive || args.tty) {
        bail!("--detach goes with neither --interactive nor --tty");
    }
    let overrides = network::with_monitor(&args, overrides(args.hypervisor.as_deref())?)?;
    let source: Source = args.image.parse()?;
    let store = Store::open(&root.images())?;
    let options = RegistryOptions { plain_http: args.plain_http, credentials: None };
    let progress = |text: &str| eprintln!("coracle: {text}");
    let settings = Settings::load()?;
    let image = store.get(&source, &args.platform, rootfs::form(&settings), &options, &progress).await?;
    let accelerator = accelerator(&overrides)?;
    let id = container::new_id()?;
    let name = args.name.clone().unwrap_or_else(|| id.clone());
    let mut config = spec::build(&args, &image.config, &id)?;
    // Of two that want one port at one instant the second finds it taken.
    let turn = if args.publish.is_empty() { None } else { Some(root.turn()?) };
    let network = network::plan(root, &args, &id)?;
    let folder = root.create(&name)?;
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut record = Record {
        id: id.clone(),
        name,
        image: args.image.clone(),
        command: spec::command(&args, &image.config)?,
        created,
        terminal: args.tty,
        detached: args.detach,
        remove: args.rm,
        stop_signal: image.config.stop_signal.clone(),
        accelerator,
        root: image.root,
        overrides,
        network: None,
        ports: Vec::new(),
        address: None,
        exit: None,
    };
    let filled = network.apply(&folder, &mut config, &mut record);
    if let Err(error) = filled.and_then(|()| fill(&folder, &config, &record, &settings)) {
        folder.clear()?;
        return Err(error);
    }
    drop(turn);
    let outcome =
        if args.detach { supervise::spawn(root, &folder, &record) } else { foreground(&folder, record, &args).await };
    // A container that never ran, or was to be removed, leaves nothing.
    let never_ran = folder.read().is_ok_and(|record| record.exit.is_none() && record.address.is_none());
    if (outcome.is_err() && never_ran) || (args.rm && !args.detach) {
        folder.discard(&id).await?;
    }
    outcome
}

/// Writes what a container's folder holds before its start. The record comes last: from then on it is known.
fn fill(folder: &Folder, config: &serde_json::Value, record: &Record, settings: &Settings) -> Result<()> {
    std::fs::write(folder.join("config.json"), config.to_string()).context("write the bundle")?;
    rootfs::make_writable(folder, &record.root, settings)?;
    if std::env::var_os("CORACLE_DEBUG").is_some() {
        // The shim logs to this file where it is there.
        std::fs::write(folder.join("log"), "").context("make the log")?;
    }
    folder.write(record)
}

async fn foreground(folder: &Folder, record: Record, args: &Args) -> Result<u8> {
    let attachment = Attachment::new(folder.path(), "init", args.interactive, args.tty)?;
    let streams = attachment.streams().clone();
    let (record, task) = create(folder, record, &streams).await?;
    let ended = attachment.run(&task, "").await;
    finish(folder, record, &task, ended.as_ref().ok().copied()).await?;
    Ok(u8::try_from(ended?).unwrap_or(u8::MAX))
}

/// Starts the shim and creates the task. Where that fails, no shim is left.
pub(crate) async fn create(
    folder: &Folder,
    mut record: Record,
    streams: &crate::task::Streams,
) -> Result<(Record, Task)> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let made = tokio::select! {
        started = attach_and_start(folder, &mut record, streams) => started,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    let error = match made {
        Ok(task) => return Ok((record, task)),
        Err(error) => error,
    };
    if record.address.is_some() {
        match Task::connect(&record).await {
            Ok(task) => end_shim(folder, &record, &task).await,
            Err(_) => shim::delete(folder.path(), &record)?,
        }
        record.address = None;
    }
    folder.write(&record)?;
    network::detach(folder, &mut record).await?;
    Err(error)
}

async fn attach_and_start(folder: &Folder, record: &mut Record, streams: &crate::task::Streams) -> Result<Task> {
    network::attach(folder, record).await?;
    start(folder, record, streams).await
}

async fn start(folder: &Folder, record: &mut Record, streams: &crate::task::Streams) -> Result<Task> {
    record.address = Some(shim::start(folder, record)?);
    folder.write(record)?;
    let task = Task::connect(record).await?;
    let bundle = folder.path().display().to_string();
    task.create(&bundle, rootfs::mounts(folder, &record.root, &Settings::load()?), streams).await?;
    Ok(task)
}

/// Ends the shim, and cleans up after one that could not do so itself.
async fn end_shim(folder: &Folder, record: &Record, task: &Task) {
    if !task.shutdown().await
        && let Err(error) = shim::delete(folder.path(), record)
    {
        eprintln!("coracle: what {} has left can't be removed: {error:#}", record.name);
    }
}

/// Deletes the task, ends the shim, notes the exit code and takes the network down. Who comes second finds nothing left to do.
pub(crate) async fn finish(folder: &Folder, record: Record, task: &Task, exit: Option<u32>) -> Result<()> {
    if exit.is_none() {
        // Whatever went wrong: the process must not go on without anybody.
        let _ = task.kill("", libc::SIGKILL.unsigned_abs()).await;
        let _ = tokio::time::timeout(CLEANUP_PATIENCE, task.wait("")).await;
    }
    // Another process of ours may be doing the same, and may have removed the container, and somebody made another one of its name.
    let Some((_lock, mut record)) = folder.lock(&record.id).await? else { return Ok(()) };
    if record.address.is_some() {
        let _ = task.delete("").await;
        end_shim(folder, &record, task).await;
        record.address = None;
    }
    if record.exit.is_none() {
        record.exit = exit.or(Some(137));
    }
    // Before the network, which takes longer: nothing may come between.
    folder.write(&record)?;
    network::detach(folder, &mut record).await
}
