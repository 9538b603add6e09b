//! The daemon: one pod, its services, its end.

use std::collections::HashMap;
use std::os::fd::FromRawFd;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Context, Result};
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use containerd_shim_protos::ttrpc::asynchronous::{Server, Service};
use coracle_process::{Role, keep_only, leave_no_core, refuse_dangerous_calls};
use coracle_settings::Settings;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;

use crate::args::Args;
use crate::latency::{Latencies, Timer};
use crate::log::Log;
use crate::pod_service::PodService;
use crate::requests::seen;
use crate::shim::Shim;
use crate::start::LISTENER_FD;
use crate::task::TaskService;

use crate::trace::{self, Recorder};
use crate::{folder, log, management, volumes};

/// The names of the service in the versions 2 and 3 of the Task API, which differ in nothing else.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// How long to leave a listener alone that can't accept.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// How long a client may take over the answer to its last request.
const GOODBYE: std::time::Duration = std::time::Duration::from_secs(1);

pub(crate) fn run(args: &Args) -> Result<()> {
    let log = log::start(&args.namespace, &args.id, args.debug);
    let latencies = Arc::new(Latencies::default());
    let subscriber =
        tracing_subscriber::registry().with(Timer(Arc::clone(&latencies))).with(log.clone()).with(Recorder);
    tracing::subscriber::set_global_default(subscriber).context("follow spans")?;
    tracing_log::LogTracer::init().context("start the log")?;
    // That one has let everything through.
    log.set_levels(log.levels());
    own_mounts().context("make a mount namespace").inspect_err(|error| ::log::error!("{error:#}"))?;
    give_up_privileges().inspect_err(|error| ::log::error!("{error:#}"))?;
    raise_descriptors();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Threads for calls that block come and go; an idle pod has one.
        .thread_keep_alive(std::time::Duration::from_millis(100))
        .build()
        .context("start the event loop")?;
    let outcome = runtime.block_on(serve(args, latencies, log));
    if let Err(error) = &outcome {
        ::log::error!("{error:#}");
    }
    // A thread in a blocking call must not hold up the end.
    runtime.shutdown_background();
    outcome
}

/// Lets go of what a pod's shim never needs: loading modules, the host's clock, raw devices, and the rest. And specifications hold secrets, as
/// guests' memory does: nothing of them goes into a core file.
fn give_up_privileges() -> Result<()> {
    leave_no_core().context("forbid core files")?;
    keep_only(Role::Shim.bounds().capabilities).context("give up capabilities")?;
    refuse_dangerous_calls().context("give up system calls")
}

/// Lets this process have as many descriptors as its limit can be raised to: a process of a container takes up to six, and who has started the
/// daemon may run with the usual 1,024.
fn raise_descriptors() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
        ::log::warn!("the limit of descriptors stays {:?}: {error}", limit.current);
    }
}

/// A mount namespace of this process's own, into which mounts of the host still propagate. What is mounted here ends with
/// this process, however it ends.
///
/// An ordinary user's process may have one only in a user namespace of its own, in which it is the same user and has all
/// capabilities, which what it starts has not. Where the host allows none, it goes on as it is: only what needs a mount fails.
fn own_mounts() -> nix::Result<()> {
    if !rustix::process::geteuid().is_root() {
        if let Err(error) = user_namespace() {
            ::log::warn!("no user namespace, and so no mounts: {error}");
        }
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
}

fn user_namespace() -> std::io::Result<()> {
    // Some hosts let it be made and then forbid to use it, which can't be taken back: tried by a process that has nothing to lose.
    let mut trial = std::process::Command::new("/proc/self/exe");
    trial.arg("-v").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: this process has one thread, so that what the closure calls finds no lock held.
    #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
    unsafe {
        trial.pre_exec(enter_user_namespace);
    }
    trial.status()?;
    enter_user_namespace()
}

fn enter_user_namespace() -> std::io::Result<()> {
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    let write = |file: &str, text: String| std::fs::write(format!("/proc/self/{file}"), text);
    write("setgroups", "deny".into())?;
    write("uid_map", format!("{user} {user} 1"))?;
    write("gid_map", format!("{group} {group} 1"))?;
    Ok(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?)
}

async fn serve(args: &Args, latencies: Arc<Latencies>, log: Log) -> Result<()> {
    let settings = Settings::load()?;
    log.follow(&settings);
    if let Some(collector) = &settings.tracing_endpoint.0 {
        trace::start(collector, &args.namespace, &args.id);
    }
    let pod = folder::pod(&settings, &args.namespace, &args.id);
    // SAFETY: `start` passes exactly this descriptor, and it is taken once.
    #[expect(unsafe_code, reason = "an inherited descriptor has no safe constructor")]
    let listener = unsafe { std::os::unix::net::UnixListener::from_raw_fd(LISTENER_FD) };
    listener.set_nonblocking(true).context("the listening socket")?;
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC).context("the listening socket")?;
    let listener = UnixListener::from_std(listener).context("the listening socket")?;
    let accepted = futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((Ok::<_, std::io::Error>(stream), listener)),
                // Out of descriptors, say. The server would log each, and ask again at once.
                Err(error) => {
                    ::log::warn!("accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    let shim = Shim::new(&args.namespace, &args.id, pod.clone(), latencies, log);
    let service = Arc::new(TaskService::new(Arc::clone(&shim)));
    let mut services = services(&service);
    services.extend(volumes::services(&shim));
    services.extend(management::services(&shim));
    services.extend(create_sandbox(Arc::new(PodService::new(Arc::clone(&shim), args.settings.clone()))));
    let mut server = Server::new().add_listener(Listener::new(accepted)).register_service(seen(services, &shim));
    server.start().await.context("serve")?;
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    tokio::select! {
        () = shim.ended() => {}
        _ = terminate.recv() => ::log::info!("SIGTERM: the pod is stopped"),
    }
    // Before the connections end: whoever waits for that finds nothing left.
    let removed = if shim.stop().await {
        folder::remove(&pod).with_context(|| format!("remove {}", pod.display()))
    } else {
        // Something may still be mounting below it.
        Err(anyhow::anyhow!("{} stays: the pod did not stop", pod.display()))
    };
    let _ = tokio::time::timeout(GOODBYE, server.shutdown()).await;
    trace::end().await;
    removed
}

/// The Task service under both of its names.
fn services(service: &Arc<TaskService>) -> HashMap<String, Service> {
    let mut services = create_task(Arc::clone(service) as _);
    let mut again: HashMap<String, Service> = create_task(Arc::clone(service) as _);
    if let Some(v2) = again.remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), v2);
    }
    services
}
