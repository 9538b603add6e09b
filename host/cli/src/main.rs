//! `coracle`: containers, each in a virtual machine of its own, without a daemon.
//!
//! The program is a client of the shim over the Task API, as containerd is. A container is a folder ([`container`]); while
//! it runs, its shim is its server. Each command has a file.

mod attach;
mod bench;
mod bundle;
mod check;
mod container;
mod debug;
mod exec;
mod follow;
mod image;
mod install;
mod iptables;
mod jail;
mod kill;
mod levels;
mod list_pods;
mod logs;
mod metrics;
mod migrate;
mod monitor;
mod network;
mod pages;
mod place;
mod pods;
mod ps;
mod pull;
mod rm;
mod rootfs;
mod run;
mod settings;
mod shim;
mod spec;
mod stats;
mod stop;
mod supervise;
mod table;
mod task;
mod terminal;
mod user;
mod version;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use coracle_settings::deprecation;

/// Containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "coracle", version, about, max_term_width = 100)]
struct Cli {
    /// The folder for images and containers: /var/lib/coracle for root, ~/.local/share/coracle for others.
    #[arg(long, global = true, env = "CORACLE_ROOT", value_name = "DIR")]
    root: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a new container.
    Run(run::Args),
    /// Run a command in a container that runs.
    Exec(exec::Args),
    /// List containers.
    Ps(ps::Args),
    /// Ask a container to end, and kill it where it does not.
    Stop(stop::Args),
    /// Send a signal to a container.
    Kill(kill::Args),
    /// Remove a container.
    Rm(rm::Args),
    /// Show what a detached container has printed.
    Logs(logs::Args),
    /// Show what a detached container prints, and pass signals on to it.
    Attach(follow::Args),
    /// Fetch an image and keep it.
    Pull(pull::PullArgs),
    /// List images that were fetched.
    Images(pull::ImagesArgs),
    /// Put what helps to find a fault into an archive.
    SupportBundle(bundle::Args),
    /// List pods that run.
    Pods(list_pods::Args),
    /// Open a shell in a pod's guest, or run one command there.
    Debug(debug::Args),
    /// Show what containers use.
    Stats(stats::Args),
    /// The packet filter of a pod's guest.
    #[command(subcommand)]
    Iptables(iptables::Command),
    /// Show or change how much a running pod's shim logs.
    Levels(levels::Args),
    /// Print figures of pods that run, as Prometheus reads them.
    Metrics(metrics::Args),
    /// Serve the figures of all pods by HTTP.
    Monitor(monitor::Args),
    /// Measure this host: starting a pod, a command in one, and what one needs.
    Bench(bench::Args),
    /// Say what this host offers and what is missing.
    Check(check::Args),
    /// Print versions.
    Version(version::VersionArgs),
    /// Print what a report of a fault should say of this host.
    Env(version::EnvArgs),
    /// Install what this program was built with.
    Install(install::InstallArgs),
    /// Take away what was installed.
    Uninstall(install::UninstallArgs),
    /// Print completions for a shell.
    Completion(pages::Completion),
    /// Write the man pages.
    #[command(hide = true)]
    Man(pages::Man),
    /// Volumes that a pod's guest has mounted.
    #[command(subcommand)]
    Volume(volume::Command),
    /// Guest images.
    #[command(subcommand)]
    Image(image::Command),
    /// Settings.
    #[command(subcommand)]
    Settings(settings::Command),
    /// Move over from another runtime.
    #[command(subcommand)]
    Migrate(migrate::Command),
    /// Serve a detached container: started by `run --detach`.
    #[command(hide = true)]
    Supervise(supervise::Args),
}

/// The exit code for the program's own failures, as docker has it.
const OWN_FAILURE: u8 = 125;

/// Has a command that only prints end quietly where nobody reads on (`coracle settings default | head`), as other programs do.
fn end_with_who_reads(command: &Command) {
    if matches!(
        command,
        Command::Run(_) | Command::Exec(_) | Command::Supervise(_) | Command::Monitor(_) | Command::Debug(_)
    ) {
        return;
    }
    // SAFETY: the default action of a signal is set, before there is another thread.
    #[expect(unsafe_code, reason = "signal(2)")]
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Says once what of the command line is deprecated.
fn warn_of_deprecated(matches: &clap::ArgMatches) {
    let (mut name, mut at) = ("coracle".to_owned(), matches);
    loop {
        let options = at.ids().filter(|id| at.value_source(id.as_str()) == Some(ValueSource::CommandLine));
        let options = options.map(|id| format!("{name} --{}", id.as_str().replace('_', "-")));
        for used in options.chain([name.clone()]).filter_map(|used| deprecation::of(deprecation::Kind::Command, &used))
        {
            eprintln!("coracle: warning: {used}");
        }
        let Some((below, inner)) = at.subcommand() else { return };
        (name, at) = (format!("{name} {below}"), inner);
    }
}

/// An error with its causes. Some tell theirs themselves: it is said once.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string).filter(|cause| !cause.is_empty()) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text.push_str(&format!(": {cause}"));
        }
    }
    text
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    warn_of_deprecated(&matches);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    end_with_who_reads(&cli.command);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("coracle: can't start the event loop: {error}");
            return ExitCode::from(OWN_FAILURE);
        }
    };
    let outcome = runtime.block_on(async {
        let root = || Ok::<_, anyhow::Error>(container::Root::new(cli.root.map_or_else(place::root, Ok)?));
        match cli.command {
            Command::Run(args) => run::run(&root()?, args).await,
            Command::Exec(args) => exec::run(&root()?, args).await,
            Command::Ps(args) => ps::run(&root()?, args).await.map(|()| 0),
            Command::Stop(args) => stop::run(&root()?, args).await.map(|()| 0),
            Command::Kill(args) => kill::run(&root()?, args).await.map(|()| 0),
            Command::Rm(args) => rm::run(&root()?, args).await.map(|()| 0),
            Command::Logs(args) => logs::run(&root()?, args).await.map(|()| 0),
            Command::Attach(args) => follow::run(&root()?, args).await,
            Command::Pull(args) => pull::pull(&root()?, args).await.map(|()| 0),
            Command::Images(args) => pull::images(&root()?, &args).map(|()| 0),
            Command::SupportBundle(args) => bundle::run(&root()?, args).await.map(|()| 0),
            Command::Bench(args) => bench::run(&root()?, args).await.map(|()| 0),
            Command::Supervise(args) => supervise::run(&root()?, args).await,
            // These look at no container's folder.
            Command::Pods(args) => list_pods::run(args).await.map(|()| 0),
            Command::Debug(args) => debug::run(args).await,
            Command::Stats(args) => stats::run(args).await.map(|()| 0),
            Command::Iptables(command) => iptables::run(command).await.map(|()| 0),
            Command::Levels(args) => levels::run(args).await.map(|()| 0),
            Command::Metrics(args) => metrics::run(args).await.map(|()| 0),
            Command::Monitor(args) => monitor::run(args).await.map(|()| 0),
            Command::Volume(command) => volume::run(command).await.map(|()| 0),
            Command::Check(args) => check::run(&args).await,
            Command::Version(args) => version::version(&args).map(|()| 0),
            Command::Env(args) => version::env(&args).map(|()| 0),
            Command::Image(command) => image::run(command).map(|()| 0),
            Command::Settings(command) => settings::run(command).map(|()| 0),
            Command::Migrate(command) => migrate::run(command).map(|()| 0),
            Command::Install(args) => install::install(&args, &Cli::command()).map(|()| 0),
            Command::Uninstall(args) => install::uninstall(&args).await.map(|()| 0),
            Command::Completion(args) => pages::completion(&args, Cli::command()).map(|()| 0),
            Command::Man(args) => pages::man(&args.folder, Cli::command()).map(|()| 0),
        }
    });
    // A thread that still reads the terminal must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("coracle: {}", told(&error));
            ExitCode::from(task::exit_code(&error).unwrap_or(OWN_FAILURE))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The help of a command and of those below it.
    fn help(command: &mut clap::Command, name: &str, page: &mut String) {
        let text = command.render_long_help().to_string();
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        page.push_str(&format!("\n## {name}\n\n```\n{}\n```\n", lines.join("\n").trim_end()));
        let below: Vec<_> = command.get_subcommands().map(|below| below.get_name().to_owned()).collect();
        for own in below {
            let Some(below) = command.find_subcommand_mut(&own) else { continue };
            if !below.is_hide_set() && own != "help" {
                help(below, &format!("{name} {own}"), page);
            }
        }
    }

    #[test]
    fn a_cause_is_told_once() {
        let cause = || std::io::Error::other("nobody listens");
        let own = coracle_machine::Error::system("connect")(cause());
        assert_eq!(told(&anyhow::Error::new(own).context("no console")), "no console: connect: nobody listens");
        assert_eq!(told(&anyhow::Error::new(cause()).context("no console")), "no console: nobody listens");
    }

    #[test]
    fn the_help_of_every_command_is_in_the_reference() {
        let mut page = String::from(
            "# Commands\n\nMade by `cargo xtask docs` from the programs' own help; not written by hand.\n",
        );
        let mut command = Cli::command().version("");
        command.build();
        help(&mut command, "coracle", &mut page);
        keep("commands.md", &page);
    }

    fn document(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference").join(name)
    }

    /// Compares a document with what it should be, or writes it where `CORACLE_DOCS` says `write`.
    fn keep(name: &str, text: &str) {
        let path = document(name);
        if std::env::var_os("CORACLE_DOCS").is_some_and(|wish| wish == "write") {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == text, "docs/reference/{name} is not what the commands say: run `cargo xtask docs`");
    }

    /// Names of commands and of their options.
    fn names(command: &clap::Command, name: &str, all: &mut Vec<String>) {
        all.push(name.to_owned());
        for option in command.get_arguments().filter_map(|argument| argument.get_long()) {
            if !matches!(option, "help" | "version" | "root") {
                all.push(format!("{name} --{option}"));
            }
        }
        for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help") {
            names(below, &format!("{name} {}", below.get_name()), all);
        }
    }

    /// As the settings' inventory: see `no_setting_goes_unannounced`.
    #[test]
    fn no_command_goes_unannounced() {
        let mut command = Cli::command();
        command.build();
        let mut there = Vec::new();
        names(&command, "coracle", &mut there);
        let known = std::fs::read_to_string(document("inventory/commands.txt")).unwrap_or_default();
        let inventory = deprecation::inventory(deprecation::Kind::Command, &known, &there, deprecation::GONE);
        keep("inventory/commands.txt", &inventory.text);
        assert_eq!(inventory.unannounced, [""; 0], "deprecate it first: docs/guide/deprecation.md");
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
