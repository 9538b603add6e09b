//! `coracle-ci`: CI results and performance series, collected, stored, shown, told.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use coracle_ci::collect::{self, Api, ApiOptions, Collected, Files, Source};
use coracle_ci::settings::{Repository, Settings};
use coracle_ci::store::Store;
use coracle_ci::{alert, evidence, export, serve, times};

/// CI results and performance series of any project on GitHub Actions: collected, stored, shown, told.
///
/// Collect by a timer, serve or export what was collected, and alert after each collection. One file of settings says what the project is.
#[derive(Debug, Parser)]
#[command(name = "coracle-ci", version)]
struct Cli {
    /// The settings (TOML); without them, what holds for a project with usual names.
    #[arg(long, global = true, env = "CORACLE_CI_SETTINGS")]
    settings: Option<PathBuf>,
    /// The database.
    #[arg(long, global = true, env = "CORACLE_CI_DATABASE", default_value = "ci.db")]
    database: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Reads what is new from GitHub's API, or from files.
    Collect(CollectArgs),
    /// Shows the pages by HTTP.
    Serve(ServeArgs),
    /// Writes the pages into a folder.
    Export {
        /// The folder; it is made.
        folder: PathBuf,
    },
    /// Tells of jobs that have become red or green, and once a week of all.
    Alert,
    /// Says that a job is not to be told of for some days.
    Mute {
        /// The job's number, as in its page's address.
        job: i64,
        /// For how many days.
        #[arg(long, default_value_t = 7)]
        days: u16,
        /// Why.
        #[arg(long)]
        reason: String,
    },
    /// Lists jobs that may be called otherwise now, or decides one.
    Rename {
        /// The two numbers are one job: the old name's, the new one's.
        #[arg(long, num_args = 2, value_names = ["OLD", "NEW"], conflicts_with = "refuse")]
        confirm: Option<Vec<i64>>,
        /// They are not.
        #[arg(long, num_args = 2, value_names = ["OLD", "NEW"])]
        refuse: Option<Vec<i64>>,
    },
}

#[derive(Debug, Args)]
struct CollectArgs {
    /// A folder of files instead of the API: its answers as JSON, logs/JOB.txt, results/JOB/*.xml, .tap, .json.
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Owner and name of a repository; without it, those of the settings, or those that the files name.
    #[arg(long)]
    repository: Vec<String>,
    /// How many days back; files are read whole.
    #[arg(long, default_value_t = 30)]
    days: u16,
    /// The API.
    #[arg(long, default_value = "https://api.github.com", env = "GITHUB_API_URL")]
    api: String,
    /// Waits where the API's limit of requests is reached, instead of ending.
    #[arg(long)]
    wait: bool,
    /// Prints what was done as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// The address.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// The path below which the pages lie.
    #[arg(long, default_value = "/")]
    root: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("coracle-ci: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let settings = Settings::read(cli.settings.as_deref())?;
    match cli.verb {
        Verb::Collect(args) => collect_all(&mut Store::open(&cli.database)?, &settings, &args),
        Verb::Serve(args) => serve_pages(cli.database, settings, args),
        Verb::Export { folder } => {
            let written = export::export(&Store::open_to_read(&cli.database)?, &settings, &folder)?;
            println!("{} pages, {} bytes, in {}", written.pages, written.bytes, folder.display());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Alert => {
            if settings.alerts.sink.is_empty() {
                bail!("the settings name no [[alerts.sink]]: there is nobody to tell");
            }
            let told = alert::alert(&mut Store::open(&cli.database)?, &settings, times::now())?;
            println!("{} told", told.len());
            Ok(ExitCode::SUCCESS)
        }
        Verb::Mute { job, days, reason } => {
            let until = times::now() + i64::from(days) * times::DAY;
            alert::mute(&mut Store::open(&cli.database)?, job, until, &reason)?;
            println!("job {job} is muted until {}", times::moment(until));
            Ok(ExitCode::SUCCESS)
        }
        Verb::Rename { confirm, refuse } => rename(&mut Store::open(&cli.database)?, &settings, confirm, refuse),
    }
}

fn collect_all(store: &mut Store, settings: &Settings, args: &CollectArgs) -> Result<ExitCode> {
    let now = times::now();
    let mut collected = Collected::default();
    let (mut source, known, since): (Box<dyn Source>, Vec<String>, i64) = match &args.from {
        Some(folder) => {
            let mut files = Files::open(folder)?;
            let known = files.repositories()?.into_iter().collect();
            collected.problems.append(&mut files.problems);
            (Box::new(files), known, 0)
        }
        None => {
            let token = std::env::var("GITHUB_TOKEN").ok().filter(|token| !token.is_empty());
            let address = args.api.trim_end_matches('/').to_owned();
            let api = Api::new(ApiOptions { address, token, wait: args.wait, again_after: Duration::from_secs(2) })?;
            (Box::new(api), Vec::new(), now - i64::from(args.days) * times::DAY)
        }
    };
    let named: Vec<Repository> = match (args.repository.is_empty(), settings.repositories.is_empty()) {
        (false, _) => {
            let of = |name: &String| {
                let own = settings.repositories.iter().find(|known| known.name == *name).cloned();
                own.unwrap_or_else(|| Repository::named(name))
            };
            args.repository.iter().map(of).collect()
        }
        (true, false) => settings.repositories.clone(),
        (true, true) => known.iter().map(|name| Repository::named(name)).collect(),
    };
    if named.is_empty() {
        bail!("no repository: give --repository OWNER/NAME, or name some in the settings");
    }
    let mut ended = Ok(());
    let mut is_whole = true;
    for repository in &named {
        if !collect::is_repository(&repository.name) {
            bail!("{:?} is not OWNER/NAME", repository.name);
        }
        ended = collect::collect(store, source.as_mut(), settings, repository, since, &mut collected);
        is_whole &= collected.is_whole;
        if let Err(error) = &ended {
            collected.problems.push(error.to_string());
            break;
        }
    }
    // What came before an end is worked out, too.
    let problems: Vec<&String> = collected.problems.iter().take(100).collect();
    store.set_fact("problems", &serde_json::to_string(&problems)?)?;
    evidence::derive(store, settings, now)?;
    if is_whole && ended.is_ok() {
        evidence::set_collected(store, now)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&collected)?);
    } else {
        let Collected { runs, jobs, logs, results, points, problems, .. } = &collected;
        println!("{runs} runs, {jobs} jobs, {logs} logs, {results} results of tests, {points} figures");
        problems.iter().for_each(|problem| eprintln!("coracle-ci: {problem}"));
    }
    ended?;
    Ok(if collected.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn serve_pages(database: PathBuf, settings: Settings, args: ServeArgs) -> Result<ExitCode> {
    let root = format!("/{}/", args.root.trim_matches('/')).replace("//", "/");
    let options = serve::ServeOptions { database, listen: args.listen, root };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("threads")?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let end = async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        };
        serve::serve(options, settings, end, |address| println!("http://{address}")).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn rename(
    store: &mut Store,
    settings: &Settings,
    confirm: Option<Vec<i64>>,
    refuse: Option<Vec<i64>>,
) -> Result<ExitCode> {
    let pair = |pair: &[i64]| match pair {
        [old, new] => Ok((*old, *new)),
        _ => bail!("two numbers are needed: OLD NEW"),
    };
    if let Some(numbers) = confirm.as_deref().or(refuse.as_deref()) {
        let (old, new) = pair(numbers)?;
        evidence::decide(store, old, new, confirm.is_some())?;
        // Ages stay those of the collection.
        let collected = store.fact("collected")?.as_deref().and_then(times::parse);
        evidence::derive(store, settings, collected.unwrap_or_else(times::now))?;
    }
    for one in evidence::renames(store)? {
        println!("{} {} {:.2} {}: {} -> {}", one.old, one.new, one.likeness, one.state, one.old_name, one.new_name);
    }
    Ok(ExitCode::SUCCESS)
}
