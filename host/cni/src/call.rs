//! Calling the plugins.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;

use crate::plan::{self, Attachment, Command, Outcome};

/// How long a plugin may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a container could not be made part of a network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plugin's program is not there.
    #[error("the network plugin {plugin} is not in {}: install containernetworking-plugins, or set network.plugin_folders", folders.join(", "))]
    Missing {
        /// The plugin.
        plugin: String,
        /// Where it was looked for.
        folders: Vec<String>,
    },
    /// A plugin could not be started, or spoken to.
    #[error("the network plugin {}: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A plugin has not ended in time; it was killed.
    #[error("the network plugin {plugin} has not ended within {} s", PATIENCE.as_secs())]
    Late {
        /// The plugin.
        plugin: String,
    },
    /// A plugin has failed.
    #[error("the network plugin {plugin} fails to {}: {text}", if *adding { "add" } else { "remove" })]
    Failed {
        /// The plugin.
        plugin: String,
        /// Whether it was asked to add.
        adding: bool,
        /// What it says.
        text: String,
    },
    /// The network has no plugin for ports.
    #[error("the network {0} publishes no ports: none of its plugins has the capability portMappings")]
    Ports(String),
}

/// Makes the container part of the network; what the plugins answer is kept in `attachment`. Where one fails, those before it are undone.
///
/// # Errors
/// [`Error`].
pub async fn add(attachment: &mut Attachment) -> Result<Outcome, Error> {
    if !attachment.ports.is_empty() && !plan::takes_ports(&attachment.network) {
        return Err(Error::Ports(attachment.network.name.clone()));
    }
    let mut result = None;
    for index in 0..attachment.network.plugins.len() {
        let Some(call) = plan::call(attachment, Command::Add, index, result.as_ref()) else { break };
        match run(attachment, &call, Command::Add).await {
            Ok(answer) => result = Some(answer),
            Err(error) => {
                attachment.result = result;
                // The one that has failed too: it may have done a part (CNI 1.0, section 4).
                del(attachment).await;
                return Err(error);
            }
        }
    }
    let outcome = result.as_ref().map(plan::outcome).unwrap_or_default();
    attachment.result = result;
    Ok(outcome)
}

/// Takes the container out of the network. Each plugin is called whatever the others say; what they complain of is given back.
pub async fn del(attachment: &Attachment) -> Vec<Error> {
    let mut problems = Vec::new();
    for index in (0..attachment.network.plugins.len()).rev() {
        let Some(call) = plan::call(attachment, Command::Del, index, attachment.result.as_ref()) else { continue };
        problems.extend(run(attachment, &call, Command::Del).await.err());
    }
    problems
}

async fn run(attachment: &Attachment, call: &plan::Call, command: Command) -> Result<Value, Error> {
    let folders = &attachment.plugin_folders;
    let program = plan::program(&call.plugin, folders, |path| path.is_file()).ok_or_else(|| Error::Missing {
        plugin: call.plugin.clone(),
        folders: folders.iter().map(|folder| folder.display().to_string()).collect(),
    })?;
    let failed = |source| Error::Start { program: program.clone(), source };
    let mut plugin = tokio::process::Command::new(&program);
    plugin.env_clear().envs(call.environment.iter().cloned()).current_dir("/").kill_on_drop(true);
    plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = plugin.spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    let input = call.input.to_string();
    let talk = async {
        let write = async {
            if let Some(mut stdin) = stdin {
                // A plugin that reads nothing says by its end why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        let (output, ()) = tokio::join!(child.wait_with_output(), write);
        output
    };
    let output = tokio::time::timeout(PATIENCE, talk).await;
    let output = output.map_err(|_| Error::Late { plugin: call.plugin.clone() })?.map_err(failed)?;
    let answer = serde_json::from_slice::<Value>(&output.stdout).unwrap_or(Value::Null);
    if output.status.success() {
        return Ok(answer);
    }
    let said = [answer["msg"].as_str(), answer["details"].as_str()];
    let said: Vec<&str> = said.into_iter().flatten().filter(|text| !text.is_empty()).collect();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let text = if said.is_empty() { format!("{}: {}", output.status, stderr.trim()) } else { said.join(": ") };
    Err(Error::Failed { plugin: call.plugin.clone(), adding: command == Command::Add, text })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;
    use crate::Network;

    /// Three plugins that note how they are called; `fails` is the one of them that can't add.
    fn three(folder: &Path, fails: &str) -> Attachment {
        for name in ["bridge", "portmap", "firewall"] {
            let script = format!(
                "#!/bin/sh\ninput=$(cat)\necho \"$CNI_COMMAND {name}\" >>{0}/calls\n\
                 case $input in *prevResult*) echo with >>{0}/calls;; esac\n\
                 if [ $CNI_COMMAND = ADD ] && [ {name} = {fails} ]; then\n\
                 echo '{{\"code\":11,\"msg\":\"no luck\",\"details\":\"at all\"}}'; exit 1; fi\n\
                 echo '{{\"ips\":[{{\"address\":\"10.1.0.2/24\"}}]}}'\n",
                folder.display()
            );
            let path = folder.join(name);
            std::fs::write(&path, script).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Attachment {
            network: Network::bridge("10.1.0.0/24", folder),
            container: "c".into(),
            namespace: "/nowhere".into(),
            ports: Vec::new(),
            plugin_folders: vec![folder.into()],
            result: None,
        }
    }

    #[tokio::test]
    async fn plugins_are_called_in_order_and_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut attachment = three(folder.path(), "none");
        let outcome = add(&mut attachment).await.unwrap();
        assert_eq!(outcome.addresses, ["10.1.0.2".parse::<std::net::IpAddr>().unwrap()]);
        assert!(del(&attachment).await.is_empty());
        let calls = std::fs::read_to_string(folder.path().join("calls")).unwrap();
        let expected = "ADD bridge\nADD portmap\nwith\nADD firewall\nwith\nDEL firewall\nwith\nDEL portmap\nwith\nDEL bridge\nwith\n";
        assert_eq!(calls, expected);
    }

    #[tokio::test]
    async fn a_failure_undoes_what_was_done() {
        let folder = tempfile::tempdir().unwrap();
        let mut attachment = three(folder.path(), "portmap");
        let error = add(&mut attachment).await.unwrap_err().to_string();
        assert_eq!(error, "the network plugin portmap fails to add: no luck: at all");
        let calls = std::fs::read_to_string(folder.path().join("calls")).unwrap();
        assert!(calls.ends_with("DEL firewall\nwith\nDEL portmap\nwith\nDEL bridge\nwith\n"), "{calls}");
        std::fs::remove_file(folder.path().join("bridge")).unwrap();
        let error = add(&mut attachment).await.unwrap_err().to_string();
        assert!(error.contains("install containernetworking-plugins"), "{error}");
    }
}
