//! The command line that containerd writes: Go's form, one dash or two.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Start,
    Delete,
    /// The daemon itself, started by `start`.
    Serve,
    Version,
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) debug: bool,
    /// The settings of the pod, where its runtime has some of its own; from `start` to the daemon.
    pub(crate) settings: Option<PathBuf>,
}

impl Args {
    pub(crate) fn parse(words: &[String]) -> Result<Self> {
        let mut args = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            bundle: None,
            debug: false,
            settings: None,
        };
        let mut words = words.iter();
        let mut action = None;
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix('-') else {
                action = Some(word.as_str());
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, attached) =
                flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value.to_owned())));
            let mut value = || attached.clone().or_else(|| words.next().cloned()).unwrap_or_default();
            match name {
                "namespace" => args.namespace = value(),
                "id" => args.id = value(),
                "bundle" => args.bundle = Some(value().into()),
                // containerd tells these by the environment too, from where they are taken.
                "address" | "publish-binary" | "socket" => drop(value()),
                "settings" => args.settings = Some(value().into()),
                "debug" => args.debug = true,
                "v" | "version" => action = Some("version"),
                other => bail!("unknown flag -{other}"),
            }
        }
        args.action = match action {
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some("serve") => Action::Serve,
            Some("version") => Action::Version,
            Some(other) => bail!("unknown action {other}"),
            None => bail!(
                "this program is started by containerd; name the runtime io.containerd.coracle.v2 there, or use `coracle run`"
            ),
        };
        if args.action != Action::Version && (args.id.is_empty() || args.namespace.is_empty()) {
            bail!("-namespace and -id are needed");
        }
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn containerds_line_is_understood() {
        let args = parse("-namespace default -address /a.sock -publish-binary /usr/bin/containerd -id x -debug start")
            .unwrap();
        assert_eq!(
            (args.action, args.namespace.as_str(), args.id.as_str(), args.debug),
            (Action::Start, "default", "x", true)
        );
        let args = parse("--namespace=k8s.io --id y -bundle /b delete").unwrap();
        assert_eq!((args.action, args.bundle), (Action::Delete, Some("/b".into())));
    }

    #[test]
    fn what_is_missing_or_unknown_is_said() {
        assert!(parse("-namespace default start").is_err());
        assert!(parse("-namespace d -id x explode").unwrap_err().to_string().contains("explode"));
        assert!(parse("-what start").is_err());
        assert!(Args::parse(&[]).unwrap_err().to_string().contains("io.containerd.coracle.v2"));
    }
}
