//! `coracle bench`: what this host takes to start a pod, to run something in one, and to have one; for people, and for the dashboard.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::{container::Root, jail, table, version};

/// Measure this host: how long a pod takes to start, a command in one, and what one needs.
///
/// Times depend on the host and on what else it does: compare them with others of the same host, by --rounds enough. Under emulation they say nothing of a host
/// with KVM.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image: one that has `true` and `sleep`.
    image: String,
    /// How often each is measured.
    #[arg(long, default_value_t = 10, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// The machine, as `coracle run` has it.
    #[arg(long, value_name = "NAME")]
    hypervisor: Option<String>,
    /// Write a page that shows all figures.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print JSON, as coracle-ci collects it.
    #[arg(long)]
    json: bool,
}

/// One series of figures.
struct Series {
    suite: &'static str,
    name: String,
    unit: &'static str,
    raw: Vec<f64>,
}

impl Series {
    /// The least, the middle and the most.
    fn ends(&self) -> (f64, f64, f64) {
        let mut sorted = self.raw.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |place: usize| sorted.get(place).copied().unwrap_or_default();
        (
            at(0),
            (at(sorted.len() / 2) + at(sorted.len().saturating_sub(1) / 2)) / 2.0,
            at(sorted.len().saturating_sub(1)),
        )
    }
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<()> {
    let bench = Bench { root: root.path().to_owned(), args };
    let series = tokio::select! {
        series = bench.measure() => series,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("it was broken off")),
    };
    // There may be none, where nothing has begun.
    let _ = bench.coracle(&["rm", "--force", &bench.name()]).status().await;
    let series = series?;
    let environment = version::environment();
    let at = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    if let Some(file) = &bench.args.report {
        std::fs::write(file, page(&at, &environment, &series)).with_context(|| format!("write {}", file.display()))?;
    }
    if bench.args.json {
        let list: Vec<Value> = series
            .iter()
            .map(|one| json!({ "suite": one.suite, "name": one.name, "unit": one.unit, "raw": one.raw }))
            .collect();
        let commit = environment["versions"]["coracle"].clone();
        let report = json!({ "at": at, "commit": commit, "environment": environment, "series": list });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    let rows: Vec<_> = series
        .iter()
        .map(|one| {
            let (least, middle, most) = one.ends();
            let number = |figure: f64| format!("{figure:.1} {}", one.unit);
            [one.name.clone(), one.raw.len().to_string(), number(least), number(middle), number(most)]
        })
        .collect();
    table::print(["FIGURE", "TIMES", "LEAST", "MIDDLE", "MOST"], &rows);
    if environment["shim"]["accelerator"]["name"] == "emulation" {
        println!("these machines are emulated: times say nothing of a host with KVM");
    }
    Ok(())
}

struct Bench {
    root: PathBuf,
    args: Args,
}

impl Bench {
    fn name(&self) -> String {
        format!("bench-{}", std::process::id())
    }

    /// This program, as a user types it.
    fn coracle(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg("--root").arg(&self.root).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        command
    }

    /// How long a command takes, in milliseconds.
    async fn time(&self, arguments: &[&str]) -> Result<f64> {
        let mut command = self.coracle(arguments);
        command.stderr(Stdio::piped());
        let begin = Instant::now();
        let output = command.output().await.context("start this program")?;
        let took = begin.elapsed().as_secs_f64() * 1000.0;
        if !output.status.success() {
            // Its last line says why; warnings come before it.
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let why = text.trim().lines().last().unwrap_or_default().trim_start_matches("coracle: ").to_owned();
            bail!("coracle {}: {why}", arguments.join(" "));
        }
        Ok(took)
    }

    /// `run` with these options, the image, and a command.
    fn run<'a>(&'a self, options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        let hypervisor = self.args.hypervisor.iter().flat_map(|name| ["--hypervisor", name]);
        let words = ["run"].into_iter().chain(options.iter().copied()).chain(["--network", "none"]).chain(hypervisor);
        words.chain([self.args.image.as_str()]).chain(command.iter().copied()).collect()
    }

    async fn measure(&self) -> Result<Vec<Series>> {
        let run = self.run(&["--rm"], &["true"]);
        // Once, to fetch the image and to warm caches.
        self.time(&run).await?;
        let mut starts = Vec::new();
        for _ in 0..self.args.rounds {
            starts.push(self.time(&run).await?);
        }
        let name = self.name();
        self.time(&self.run(&["--detach", "--name", &name], &["sleep", "100000"])).await?;
        let mut execs = Vec::new();
        for _ in 0..self.args.rounds {
            execs.push(self.time(&["exec", &name, "true"]).await?);
        }
        let mut series = vec![
            Series { suite: "start", name: "run --rm true".to_owned(), unit: "ms", raw: starts },
            Series { suite: "exec", name: "exec true".to_owned(), unit: "ms", raw: execs },
        ];
        series.extend(self.memory(&name).await?);
        Ok(series)
    }

    /// What each process of the idle pod has of the host's memory, its part of what is shared.
    async fn memory(&self, name: &str) -> Result<Vec<Series>> {
        let listed =
            self.coracle(&["ps", "--json"]).stdout(Stdio::piped()).output().await.context("list containers")?;
        let listed: Vec<Value> = serde_json::from_slice(&listed.stdout).context("the list of containers")?;
        let own = listed.iter().find(|one| one["name"] == name).context("the pod has ended")?;
        let id = own["id"].as_str().context("its number")?;
        let mut by_role: std::collections::BTreeMap<&str, f64> = std::collections::BTreeMap::new();
        for (role, pid) in jail::processes(id).await? {
            // One that has ended meanwhile has none.
            let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            *by_role.entry(role).or_default() += kibibytes(&text);
        }
        let all = by_role.values().sum();
        let one = |name: String, figure| Series { suite: "memory", name, unit: "KiB", raw: vec![figure] };
        let mut series = vec![one("an idle pod".to_owned(), all)];
        series.extend(by_role.into_iter().map(|(role, figure)| one(format!("of which {role}"), figure)));
        Ok(series)
    }
}

/// A process' proportional share (proc(5), smaps_rollup: Pss).
fn kibibytes(rollup: &str) -> f64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}

/// A page by itself: a table, and each figure as a mark on a line.
fn page(at: &str, environment: &Value, series: &[Series]) -> String {
    let mut rows = String::new();
    for one in series {
        let (least, middle, most) = one.ends();
        let mut marks = String::new();
        for figure in &one.raw {
            let x = if most > 0.0 { 4.0 + 192.0 * figure / most } else { 4.0 };
            let _ = write!(marks, "<circle cx=\"{x:.1}\" cy=\"10\" r=\"3\"/>");
        }
        let _ = writeln!(
            rows,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{least:.1}</td><td>{middle:.1}</td><td>{most:.1}</td><td>{}</td>\
             <td><svg width=\"200\" height=\"20\" aria-hidden=\"true\"><line x1=\"4\" x2=\"196\" y1=\"10\" y2=\"10\"/>{marks}</svg></td></tr>",
            escaped(&one.name),
            one.raw.len(),
            escaped(one.unit)
        );
    }
    let environment = serde_json::to_string_pretty(environment).unwrap_or_default();
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"color-scheme\" content=\"light dark\"><title>Coracle on this host</title>\
         <style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem}}table{{border-collapse:collapse}}th,td{{text-align:left;padding:.3rem .8rem;border-top:1px solid #8886}}\
         circle{{fill:currentColor;opacity:.55}}line{{stroke:#8888}}</style></head><body><h1>Coracle on this host</h1><p>{}</p>\
         <table><thead><tr><th>Figure</th><th>Times</th><th>Least</th><th>Middle</th><th>Most</th><th>Unit</th><th>Each, from 0</th></tr></thead><tbody>\n{rows}</tbody></table>\
         <h2>Where</h2><pre>{}</pre></body></html>\n",
        escaped(at),
        escaped(&environment)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_has_its_middle_and_its_ends() {
        let series = |raw: &[f64]| Series { suite: "s", name: "<n>".into(), unit: "ms", raw: raw.to_vec() };
        assert_eq!(series(&[3.0, 1.0, 2.0]).ends(), (1.0, 2.0, 3.0));
        assert_eq!(series(&[4.0, 1.0]).ends(), (1.0, 2.5, 4.0));
        assert_eq!(series(&[]).ends(), (0.0, 0.0, 0.0));
        let page = page("now", &json!({ "a": "<script>" }), &[series(&[1.0, 2.0])]);
        assert!(page.contains("&lt;n&gt;") && page.contains("&lt;script&gt;") && !page.contains("<script>"));
        assert_eq!(page.matches("<circle").count(), 2);
    }

    #[test]
    fn the_kernels_figure_is_read() {
        assert_eq!(kibibytes("Rss:  10 kB\nPss:   7 kB\nPss_Dirty: 3 kB\n"), 7.0);
        assert_eq!(kibibytes(""), 0.0);
    }
}
