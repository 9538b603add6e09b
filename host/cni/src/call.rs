//! Calling the plugins.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use crate::plan::{self, Attachment, Command};
use crate::{Network, namespace};

/// How long a plugin may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a container could not be made part of a network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plugin's program is not there.
    #[error("the network plugin {plugin} is not in {}: install it (containernetworking-plugins has the usual ones), or set network.plugin_folders", folders.join(", "))]
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

/// Whether the network can do what is asked of it, and all of its plugins are there.
///
/// # Errors
/// [`Error::Ports`], [`Error::Missing`].
pub fn check(attachment: &Attachment) -> Result<(), Error> {
    let network = &attachment.network;
    if !attachment.ports.is_empty() && !plan::takes_ports(network) {
        return Err(Error::Ports(network.name.clone()));
    }
    programs(network, &attachment.plugin_folders).map(drop)
}

/// The programs of a network's plugins, in their order.
///
/// # Errors
/// [`Error::Missing`].
pub fn programs(network: &Network, folders: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    network.plugins.iter().map(|plugin| program(folders, plan::name(plugin))).collect()
}

fn program(folders: &[PathBuf], plugin: &str) -> Result<PathBuf, Error> {
    plan::program(plugin, folders, |path| path.is_file()).ok_or_else(|| Error::Missing {
        plugin: plugin.to_owned(),
        folders: folders.iter().map(|folder| folder.display().to_string()).collect(),
    })
}

/// Makes the container part of the network by one of its plugins, which come in their order; what it answers is kept in `attachment`.
/// Where it fails, [`del`] undoes all (CNI 1.0, section 4).
///
/// # Errors
/// [`Error`].
pub async fn add(attachment: &mut Attachment, index: usize) -> Result<(), Error> {
    if let Some(call) = plan::call(attachment, Command::Add, index, attachment.result.as_ref()) {
        attachment.result = Some(run(attachment, &call, Command::Add).await?);
    }
    Ok(())
}

/// Takes the container out of the network. Each plugin is called whatever the others say; what they complain of is given back.
pub async fn del(attachment: &Attachment) -> Vec<Error> {
    let mut problems = Vec::new();
    for index in (0..attachment.network.plugins.len()).rev() {
        let Some(call) = plan::call(attachment, Command::Del, index, attachment.result.as_ref()) else { continue };
        match run(attachment, &call, Command::Del).await {
            // Without it nothing has been added, and without an answer of any plugin nothing by another one.
            Err(Error::Missing { .. }) if attachment.result.is_none() => {}
            outcome => problems.extend(outcome.err()),
        }
    }
    problems
}

/// The most bytes of a plugin's answer, and of what it says beside that.
const ANSWER_BYTES: u64 = 1 << 20;
const WORDS_BYTES: u64 = 64 << 10;

/// What comes from a plugin, and one byte more than the most where there is more.
async fn beginning(stream: Option<impl AsyncRead + Unpin>, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        (&mut stream).take(most + 1).read_to_end(&mut bytes).await?;
        // Who has more to say than anybody wants is not ended half-way by that.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    }
    Ok(bytes)
}

async fn run(attachment: &Attachment, call: &plan::Call, command: Command) -> Result<Value, Error> {
    let program = program(&attachment.plugin_folders, &call.plugin)?;
    let failed = |source| Error::Start { program: program.clone(), source };
    let mut plugin = tokio::process::Command::new(&program);
    plugin.env_clear().envs(call.environment.iter().cloned()).current_dir("/").kill_on_drop(true);
    if command == Command::Del && !namespace::is_there(&attachment.namespace) {
        // It is gone, after the host has started anew: what is kept elsewhere is given back all the same (CNI 1.0, section 2).
        plugin.env("CNI_NETNS", "");
    }
    // What a terminal sends its programs is not for a plugin, which must not end half-way.
    plugin.process_group(0);
    plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = plugin.spawn().map_err(failed)?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let input = call.input.to_string();
    let talk = async {
        let write = async {
            if let Some(mut stdin) = stdin {
                // A plugin that reads nothing says by its end why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        let (stdout, stderr, ()) = tokio::join!(beginning(stdout, ANSWER_BYTES), beginning(stderr, WORDS_BYTES), write);
        Ok((child.wait().await?, stdout?, stderr?))
    };
    let output = tokio::time::timeout(PATIENCE, talk).await;
    let output: Result<_, std::io::Error> = output.map_err(|_| Error::Late { plugin: call.plugin.clone() })?;
    let (status, stdout, stderr) = output.map_err(failed)?;
    if stdout.len() as u64 > ANSWER_BYTES {
        let text = format!("its answer has more than {ANSWER_BYTES} bytes");
        return Err(Error::Failed { plugin: call.plugin.clone(), adding: command == Command::Add, text });
    }
    let answer = serde_json::from_slice::<Value>(&stdout).unwrap_or(Value::Null);
    if status.success() && (command == Command::Del || answer.is_object()) {
        return Ok(answer);
    }
    let said = [answer["msg"].as_str(), answer["details"].as_str()];
    let said: Vec<&str> = said.into_iter().flatten().filter(|text| !text.is_empty()).collect();
    let stderr = String::from_utf8_lossy(&stderr);
    let text = if said.is_empty() { format!("{status}: {}", stderr.trim()) } else { said.join(": ") };
    Err(Error::Failed { plugin: call.plugin.clone(), adding: command == Command::Add, text })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

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
            network: Network::bridge(&["10.1.0.0/24".into()], folder),
            container: "c".into(),
            namespace: "/nowhere".into(),
            ports: Vec::new(),
            plugin_folders: vec![folder.into()],
            result: None,
        }
    }

    #[tokio::test]
    async fn a_plugin_that_answers_without_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut attachment = three(folder.path(), "none");
        for (to, is_refused) in [("1", true), ("2", false)] {
            let script =
                format!("#!/bin/sh\ncat >/dev/null; head -c 3000000 /dev/zero | tr '\\0' x >&{to}; echo '{{}}'\n");
            std::fs::write(folder.path().join("bridge"), script).unwrap();
            let outcome = add(&mut attachment, 0).await;
            assert_eq!(outcome.is_err(), is_refused, "{to}: {outcome:?}");
            assert!(outcome.err().is_none_or(|error| error.to_string().contains("more than 1048576 bytes")), "{to}");
        }
    }

    #[tokio::test]
    async fn plugins_are_called_in_order_and_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut attachment = three(folder.path(), "none");
        for index in 0..3 {
            add(&mut attachment, index).await.unwrap();
        }
        let outcome = plan::outcome(attachment.result.as_ref().unwrap());
        assert_eq!(outcome.addresses, ["10.1.0.2".parse::<std::net::IpAddr>().unwrap()]);
        assert!(del(&attachment).await.is_empty());
        let calls = std::fs::read_to_string(folder.path().join("calls")).unwrap();
        let expected = "ADD bridge\nADD portmap\nwith\nADD firewall\nwith\nDEL firewall\nwith\nDEL portmap\nwith\nDEL bridge\nwith\n";
        assert_eq!(calls, expected);
    }

    #[tokio::test]
    async fn a_failure_says_why_and_can_be_undone() {
        let folder = tempfile::tempdir().unwrap();
        let mut attachment = three(folder.path(), "portmap");
        add(&mut attachment, 0).await.unwrap();
        let error = add(&mut attachment, 1).await.unwrap_err().to_string();
        assert_eq!(error, "the network plugin portmap fails to add: no luck: at all");
        assert!(del(&attachment).await.is_empty());
        let calls = std::fs::read_to_string(folder.path().join("calls")).unwrap();
        assert!(calls.ends_with("DEL firewall\nwith\nDEL portmap\nwith\nDEL bridge\nwith\n"), "{calls}");
        std::fs::remove_file(folder.path().join("bridge")).unwrap();
        let error = check(&attachment).unwrap_err().to_string();
        assert!(error.contains("install it (containernetworking-plugins"), "{error}");
        assert_eq!(del(&attachment).await.len(), 1, "the one that is gone");
    }
}
