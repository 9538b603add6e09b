//! The daemon's log: what happens in the shim and its libraries, what the monitor says and what the guest prints, in one stream. Each line names its
//! pod, and the request and the container on whose behalf it was written.
//!
//! Levels belong to components and can be changed in a running pod ([`Log::set_levels`]).

mod line;
mod spans;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::SystemTime;

use coracle_settings::{Component, Level, Levels, LogFormat, Settings};
use tracing::{Event, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use line::Line;

/// Where systemd's journal takes lines (systemd: "Native Journal Protocol").
const JOURNAL: &str = "/run/systemd/journal/socket";

/// The log of a pod's shim. Clones share it.
#[derive(Clone)]
pub(crate) struct Log {
    // Lines come from any thread; held for a write, which does not wait.
    out: Arc<Mutex<Out>>,
    // Looked at for each line, and changed by a request.
    levels: Arc<RwLock<Levels>>,
    /// Whether containerd wants to see more than the settings say.
    debug: bool,
    /// containerd's namespace, and the pod.
    of: (String, String),
}

struct Out {
    place: Option<File>,
    journal: Option<UnixDatagram>,
    format: LogFormat,
}

/// The log of a pod, which is made once.
pub(crate) fn start(namespace: &str, pod: &str, debug: bool) -> Log {
    // Opened for both directions, so that neither the open nor a write waits for a reader.
    let place = File::options().read(true).append(true).custom_flags(libc::O_NONBLOCK).open("log").ok();
    let out = Out { place, journal: None, format: LogFormat::Text };
    let levels = Levels::new(if debug { Level::Debug } else { Level::Info });
    let of = (namespace.to_owned(), pod.to_owned());
    let log = Log { out: Arc::new(Mutex::new(out)), levels: Arc::new(RwLock::new(levels.clone())), debug, of };
    log.set_levels(levels);
    log
}

impl Log {
    /// What is written from now on.
    pub(crate) fn set_levels(&self, levels: Levels) {
        // What nobody writes costs nothing where it is said.
        let most = Component::ALL.into_iter().map(|component| levels.of(component)).max();
        log::set_max_level(match most.unwrap_or(Level::Off) {
            Level::Off => log::LevelFilter::Off,
            Level::Error => log::LevelFilter::Error,
            Level::Warn => log::LevelFilter::Warn,
            Level::Info => log::LevelFilter::Info,
            Level::Debug => log::LevelFilter::Debug,
        });
        *self.levels.write().unwrap_or_else(PoisonError::into_inner) = levels;
    }

    /// What is written now.
    pub(crate) fn levels(&self) -> Levels {
        self.levels.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How lines are written from now on. Where the journal does not take any, they stay where they were, and say so.
    pub(crate) fn set_format(&self, format: LogFormat) {
        let connect = || {
            let socket = UnixDatagram::unbound()?;
            socket.connect(JOURNAL)?;
            socket.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(socket)
        };
        let journal = (format == LogFormat::Journal).then(connect).transpose();
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        match journal {
            Ok(journal) => (out.journal, out.format) = (journal, format),
            Err(error) => {
                drop(out);
                log::warn!("log.format = \"journal\": {JOURNAL}: {error}: lines are text");
            }
        }
    }

    /// Writes as these settings say; all of it where containerd wants to see more.
    pub(crate) fn follow(&self, settings: &Settings) {
        if !self.debug {
            self.set_levels(settings.log_levels.clone());
        }
        self.set_format(settings.log_format);
    }

    fn writes(&self, component: Component, level: tracing::Level) -> bool {
        let wanted = match level {
            tracing::Level::ERROR => Level::Error,
            tracing::Level::WARN => Level::Warn,
            tracing::Level::INFO => Level::Info,
            _ => Level::Debug,
        };
        wanted <= self.levels.read().unwrap_or_else(PoisonError::into_inner).of(component)
    }
}

/// Of which component a line is; none of libraries that are not ours, whose chatter is theirs.
fn component(target: &str) -> Option<Component> {
    let crate_name = target.split("::").next().unwrap_or_default();
    match crate_name {
        "monitor" => Some(Component::Monitor),
        "guest" => Some(Component::Console),
        "coracle_sandbox" => Some(Component::Sandbox),
        "coracle_storage" | "coracle_network" => Some(Component::Plan),
        name if name.starts_with("containerd_shim_coracle") => Some(Component::Shim),
        name if name.starts_with("coracle") => Some(Component::Driver),
        _ => None,
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, attributes: &tracing::span::Attributes<'_>, id: &tracing::Id, context: Context<'_, S>) {
        spans::remember(attributes, id, &context);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        // One of the crate `log` says here whose it is.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        let Some(component) = component(metadata.target()).filter(|of| self.writes(*of, *metadata.level())) else {
            return;
        };
        let mut text = spans::Message::default();
        event.record(&mut text);
        let line = Line {
            at: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
            level: *metadata.level(),
            component: component.name(),
            namespace: &self.of.0,
            pod: &self.of.1,
            fields: spans::fields(event, &context),
            text: text.0,
        };
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(journal), LogFormat::Journal) = (&out.journal, out.format) {
            // One that is slow loses a line; one that takes none gets no further ones.
            match journal.send(&line.journal()) {
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => out.format = LogFormat::Text,
                _ => return,
            }
        }
        let text = if out.format == LogFormat::Json { line.json() } else { line.text() };
        if let Some(place) = &mut out.place {
            // Where nobody takes it the line is lost, and the pod goes on.
            let _ = place.write_all(text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn lines_name_their_pod_their_request_and_their_container() {
        let file = tempfile::tempfile().unwrap();
        let out = Out { place: Some(file.try_clone().unwrap()), journal: None, format: LogFormat::Json };
        let levels = Arc::new(RwLock::new(Levels::new(Level::Off)));
        let of = ("k8s.io".into(), "pod-1".into());
        let log = Log { out: Arc::new(Mutex::new(out)), levels, debug: false, of };
        log.set_levels(Levels::parse("info,sandbox=debug,driver=off").unwrap());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(log.clone()), || {
            let request = tracing::debug_span!("request", method = "Create", request = 7_u64, container = "c1");
            request.in_scope(|| {
                tracing::debug_span!("agent_call", method = "CreateContainer").in_scope(|| {
                    tracing::debug!(target: "coracle_sandbox::create", "a \"quoted\"\nline");
                    tracing::error!(target: "coracle_process", "of a component that is off");
                    tracing::error!(target: "ttrpc", "of a stranger");
                    tracing::debug!(target: "guest::console", "below its level");
                });
            });
            assert_eq!(log.levels().of(Component::Driver), Level::Off);
            log.set_levels(Levels::new(Level::Debug));
            log.set_format(LogFormat::Text);
            tracing::debug!(target: "guest::console", "Linux version 6.1");
        });
        let mut text = String::new();
        std::io::Seek::rewind(&mut &file).unwrap();
        (&file).read_to_string(&mut text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        let first: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
        for (key, value) in [
            ("level", "debug"),
            ("component", "sandbox"),
            ("namespace", "k8s.io"),
            ("pod", "pod-1"),
            ("container", "c1"),
            ("request", "7"),
            ("msg", "a \"quoted\"\nline"),
        ] {
            assert_eq!(first[key], value, "{key}: {first}");
        }
        assert!(
            lines[1].ends_with("level=debug msg=\"Linux version 6.1\" component=console namespace=k8s.io pod=pod-1")
        );
    }
}
