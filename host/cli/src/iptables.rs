//! `coracle iptables`: the packet filter of a pod's guest.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use coracle_protocol::management::IPTABLES;
use serde_json::json;

use crate::pods;

/// The packet filter of a pod's guest, where its image has iptables' tools.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Print all rules, as iptables-save(8) does.
    Get {
        /// The pod, by its id, the beginning of that, or NAMESPACE/NAME of Kubernetes.
        pod: String,
        /// Those of IPv6.
        #[arg(short = '6', long)]
        ipv6: bool,
    },
    /// Replace all rules, as iptables-restore(8) does.
    Set {
        /// The pod, by its id, the beginning of that, or NAMESPACE/NAME of Kubernetes.
        pod: String,
        /// The file with the rules; standard input where none is named.
        file: Option<PathBuf>,
        /// Those of IPv6.
        #[arg(short = '6', long)]
        ipv6: bool,
    },
}

/// The most bytes of rules that are sent.
const RULES_BYTES: u64 = 2 << 20;

pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Get { pod, ipv6 } => {
            let (pod, _) = pods::find(&pod).await?;
            let answer = pod.ask(IPTABLES, &json!({ "ipv6": ipv6 })).await?;
            // A guest's words: nothing in them is for a terminal.
            let rules = answer["rules"].as_str().unwrap_or_default();
            let clean: String = rules.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
            print!("{clean}");
        }
        Command::Set { pod, file, ipv6 } => {
            let (pod, _) = pods::find(&pod).await?;
            let mut rules = String::new();
            match &file {
                Some(file) => std::fs::File::open(file)
                    .and_then(|file| file.take(RULES_BYTES).read_to_string(&mut rules))
                    .with_context(|| format!("read {}", file.display()))?,
                None => std::io::stdin().take(RULES_BYTES).read_to_string(&mut rules).context("read the rules")?,
            };
            if rules.len() as u64 >= RULES_BYTES {
                bail!("the rules are more than {RULES_BYTES} bytes");
            }
            pod.ask(IPTABLES, &json!({ "ipv6": ipv6, "rules": rules })).await?;
        }
    }
    Ok(())
}
