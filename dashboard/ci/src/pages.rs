//! Pages: each is a view written as HTML, or as JSON. All that was collected is escaped; links lead to where they may; no script but the pages' own
//! runs (see [`POLICY`]).

use std::path::PathBuf;

use askama::Template;
use schemars::{JsonSchema, schema_for};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::settings::Settings;
use crate::store::Store;
use crate::times;
use crate::views::{self, Age, Filter};

/// What a browser may do with a page (Content Security Policy, level 3), as far as a page itself may say it.
macro_rules! policy {
    () => {
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self'"
    };
}

/// The same in an answer's head, which alone may say the last part.
pub const POLICY: &str = concat!(policy!(), "; frame-ancestors 'none'");

/// Files that pages need: name, media type, contents. uPlot 1.6.32 is as its authors publish it; `vendor/README.md` says where it is from.
pub const ASSETS: [(&str, &str, &str); 5] = [
    ("style.css", "text/css; charset=utf-8", include_str!("../assets/style.css")),
    ("board.js", "text/javascript; charset=utf-8", include_str!("../assets/board.js")),
    ("icon.svg", "image/svg+xml", include_str!("../assets/icon.svg")),
    ("uplot.js", "text/javascript; charset=utf-8", include_str!("../vendor/uplot/uPlot.iife.min.js")),
    ("uplot.css", "text/css; charset=utf-8", include_str!("../vendor/uplot/uPlot.min.css")),
];

/// Which page.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Page {
    /// All jobs.
    Overview,
    /// One job.
    Job(i64),
    /// One test.
    Test(i64),
    /// What is flaky.
    Flakes,
    /// Kinds of failures.
    Failures,
    /// One kind.
    Failure(i64),
    /// Pull requests.
    Pulls,
    /// One of them: owner, name, number.
    Pull(String, String, i64),
    /// Series.
    Performance,
    /// One of them.
    Series(i64),
    /// Costs.
    Cost,
    /// Gates, deprecations, renames.
    Security,
}

impl Page {
    /// By its path, without the slash before it: the inverse of [`Self::path`].
    #[must_use]
    pub fn at(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').collect();
        let number = |text: &str| text.parse::<i64>().ok().filter(|number| *number >= 0);
        Some(match parts.as_slice() {
            [""] | ["overview"] => Self::Overview,
            ["flakes"] => Self::Flakes,
            ["failures"] => Self::Failures,
            ["pulls"] => Self::Pulls,
            ["performance"] => Self::Performance,
            ["cost"] => Self::Cost,
            ["security"] => Self::Security,
            ["job", id] => Self::Job(number(id)?),
            ["test", id] => Self::Test(number(id)?),
            ["failure", id] => Self::Failure(number(id)?),
            ["series", id] => Self::Series(number(id)?),
            ["pull", owner, name, id] if crate::collect::is_repository(&format!("{owner}/{name}")) => {
                Self::Pull((*owner).to_owned(), (*name).to_owned(), number(id)?)
            }
            _ => return None,
        })
    }

    /// Its path, without a slash before it.
    #[must_use]
    pub fn path(&self) -> String {
        match self {
            Self::Overview => "overview".to_owned(),
            Self::Job(id) => format!("job/{id}"),
            Self::Test(id) => format!("test/{id}"),
            Self::Flakes => "flakes".to_owned(),
            Self::Failures => "failures".to_owned(),
            Self::Failure(id) => format!("failure/{id}"),
            Self::Pulls => "pulls".to_owned(),
            Self::Pull(owner, name, id) => format!("pull/{owner}/{name}/{id}"),
            Self::Performance => "performance".to_owned(),
            Self::Series(id) => format!("series/{id}"),
            Self::Cost => "cost".to_owned(),
            Self::Security => "security".to_owned(),
        }
    }

    /// The part of the menu that it is in.
    fn menu(&self) -> &'static str {
        match self {
            Self::Overview | Self::Job(_) | Self::Test(_) => "overview",
            Self::Flakes => "flakes",
            Self::Failures | Self::Failure(_) => "failures",
            Self::Pulls | Self::Pull(..) => "pulls",
            Self::Performance | Self::Series(_) => "performance",
            Self::Cost => "cost",
            Self::Security => "security",
        }
    }
}

/// How pages refer to one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Links {
    /// Served, below this path, which ends with a slash.
    Served(String),
    /// Files, this many folders deep.
    Files(usize),
}

/// What all pages have around them.
struct Frame<'a> {
    title: &'a str,
    age: Age,
    current: &'static str,
    path: String,
    links: &'a Links,
}

impl Frame<'_> {
    fn root(&self) -> String {
        match self.links {
            Links::Served(root) => root.clone(),
            Links::Files(depth) => "../".repeat(*depth),
        }
    }

    fn page(&self, path: &str) -> String {
        match self.links {
            Links::Served(_) => format!("{}{path}", self.root()),
            Links::Files(_) => format!("{}{path}.html", self.root()),
        }
    }

    fn home(&self) -> String {
        match self.links {
            Links::Served(root) => root.clone(),
            Links::Files(_) => self.page("index"),
        }
    }

    fn to(&self, kind: &str, id: impl Of<i64>) -> String {
        self.page(&format!("{kind}/{}", id.of()))
    }

    fn pull(&self, repository: &str, id: impl Of<i64>) -> String {
        self.page(&format!("pull/{repository}/{}", id.of()))
    }

    fn asset(&self, name: &str) -> String {
        format!("{}assets/{name}", self.root())
    }

    /// A link that was collected: only to the web, whatever it says.
    fn outside<'b>(&self, link: &'b str) -> &'b str {
        if link.starts_with("https://") || link.starts_with("http://") { link } else { "#" }
    }

    fn menu(&self) -> [(&'static str, String, &'static str); 7] {
        [
            ("overview", self.home(), "Overview"),
            ("flakes", self.page("flakes"), "Flakes"),
            ("failures", self.page("failures"), "Failures"),
            ("pulls", self.page("pulls"), "Pull requests"),
            ("performance", self.page("performance"), "Performance"),
            ("cost", self.page("cost"), "Cost"),
            ("security", self.page("security"), "Security"),
        ]
    }

    fn api(&self) -> Option<String> {
        (!self.is_export() && !self.path.is_empty()).then(|| format!("{}api/v1/{}", self.root(), self.path))
    }

    fn is_export(&self) -> bool {
        matches!(self.links, Links::Files(_))
    }

    fn policy(&self) -> &'static str {
        policy!()
    }

    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    fn short(&self, sha: &str) -> String {
        views::short(sha)
    }

    fn day(&self, at: impl Of<i64>) -> String {
        times::day(at.of())
    }

    fn moment(&self, at: impl Of<i64>) -> String {
        times::moment(at.of())
    }

    fn span(&self, seconds: impl Of<i64>) -> String {
        times::span(seconds.of())
    }

    /// A figure with as many digits as say something.
    fn figure(&self, figure: impl Of<f64>) -> String {
        let figure = figure.of();
        match figure.abs() {
            0.0 => "0".to_owned(),
            large if large >= 1000.0 => format!("{figure:.0}"),
            middle if middle >= 10.0 => format!("{figure:.1}"),
            small if small >= 0.001 => format!("{figure:.3}"),
            _ => format!("{figure:.1e}"),
        }
    }
}

/// A number, however many references templates have put before it.
trait Of<T> {
    fn of(&self) -> T;
}

impl Of<i64> for i64 {
    fn of(&self) -> i64 {
        *self
    }
}

impl Of<f64> for f64 {
    fn of(&self) -> f64 {
        *self
    }
}

impl<T, U: Of<T> + ?Sized> Of<T> for &U {
    fn of(&self) -> T {
        (**self).of()
    }
}

macro_rules! templates {
    ($($name:ident $path:literal $view:ty $(, $filter:ident)?;)*) => {
        $(#[derive(Template)]
        #[template(path = $path)]
        struct $name<'a> {
            frame: &'a Frame<'a>,
            view: &'a $view,
            $($filter: &'a Filter,)?
        })*
    };
}

templates! {
    OverviewTemplate "overview.html" views::Overview, filter;
    JobTemplate "job.html" views::JobPage;
    TestTemplate "test.html" views::TestPage;
    FlakesTemplate "flakes.html" views::Flakes, filter;
    FailuresTemplate "failures.html" views::Failures, filter;
    FailureTemplate "failure.html" views::ClusterPage;
    PullsTemplate "pulls.html" views::Pulls, filter;
    PullTemplate "pull.html" views::PullPage;
    PerformanceTemplate "performance.html" views::Performance, filter;
    SeriesTemplate "series.html" views::SeriesPage, filter;
    CostTemplate "cost.html" views::Cost;
    SecurityTemplate "security.html" views::Security;
}

#[derive(Template)]
#[template(path = "fault.html")]
struct FaultTemplate<'a> {
    frame: &'a Frame<'a>,
    status: &'a str,
    reason: &'a str,
}

/// How a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form<'a> {
    /// HTML, with links like these.
    Html(&'a Links),
    /// JSON.
    Json,
}

/// What every answer of the API has around it.
#[derive(Serialize, JsonSchema)]
struct Answer<'a, T> {
    /// How old the data are.
    age: &'a Age,
    /// What was asked for.
    data: &'a T,
}

/// Writes a page.
///
/// # Errors
/// [`Error::Missing`] for what there is not, [`Error::Database`], [`Error::Page`].
pub fn write(store: &Store, settings: &Settings, page: &Page, filter: &Filter, form: Form<'_>) -> Result<String> {
    let age = views::age(store, times::now())?;
    macro_rules! write {
        ($template:ident, $view:expr $(, $filter:ident)?) => {{
            let view = $view?;
            match form {
                Form::Json => json(&Answer { age: &age, data: &view }),
                Form::Html(links) => {
                    let frame = Frame { title: &settings.title, age, current: page.menu(), path: page.path(), links };
                    Ok($template { frame: &frame, view: &view $(, $filter)? }.render()?)
                }
            }
        }};
    }
    match page {
        Page::Overview => write!(OverviewTemplate, views::overview(store, filter), filter),
        Page::Job(id) => write!(JobTemplate, views::job(store, *id)),
        Page::Test(id) => write!(TestTemplate, views::test(store, *id)),
        Page::Flakes => write!(FlakesTemplate, views::flakes(store, filter), filter),
        Page::Failures => write!(FailuresTemplate, views::failures(store, filter), filter),
        Page::Failure(id) => write!(FailureTemplate, views::cluster(store, *id)),
        Page::Pulls => write!(PullsTemplate, views::pulls(store, filter), filter),
        Page::Pull(owner, name, id) => write!(PullTemplate, views::pull(store, &format!("{owner}/{name}"), *id)),
        Page::Performance => write!(PerformanceTemplate, views::performance(store, filter), filter),
        Page::Series(id) => write!(SeriesTemplate, views::series(store, *id, filter), filter),
        Page::Cost => write!(CostTemplate, views::cost(store, filter, &settings.minute_costs)),
        Page::Security => write!(SecurityTemplate, views::security(store, settings)),
    }
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|error| Error::Malformed { what: "an answer".to_owned(), reason: error.to_string() })
}

/// Writes the page that says why there is none.
///
/// # Errors
/// [`Error::Page`].
pub fn fault(settings: &Settings, links: &Links, status: &str, reason: &str) -> Result<String> {
    let age = Age { collected: None, seconds: None, problems: Vec::new() };
    let frame = Frame { title: &settings.title, age, current: "", path: String::new(), links };
    Ok(FaultTemplate { frame: &frame, status, reason }.render()?)
}

/// The schema of each answer of the API (JSON Schema, draft 2020-12), by its path.
///
/// # Errors
/// [`Error::Malformed`], which would be a fault of this program.
pub fn schema() -> Result<String> {
    macro_rules! schemas {
        ($($path:literal $view:ty;)*) => {
            serde_json::json!({ $($path: schema_for!(Answer<'_, $view>)),* })
        };
    }
    json(&schemas! {
        "overview" views::Overview;
        "job/{id}" views::JobPage;
        "test/{id}" views::TestPage;
        "flakes" views::Flakes;
        "failures" views::Failures;
        "failure/{id}" views::ClusterPage;
        "pulls" views::Pulls;
        "pull/{owner}/{name}/{id}" views::PullPage;
        "performance" views::Performance;
        "series/{id}" views::SeriesPage;
        "cost" views::Cost;
        "security" views::Security;
    })
}

/// A badge: two words beside one another, as an image.
#[must_use]
pub fn badge(left: &str, right: &str) -> String {
    let colour = match right {
        "passed" => "#1a7f37",
        "failed" => "#b42318",
        _ => "#57606a",
    };
    let escape = |text: &str| {
        let text: String = text.chars().take(60).collect();
        text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
    };
    let width = |text: &str| 12 + 7 * text.chars().take(60).count();
    let (one, two) = (width(left), width(right));
    let (left, right, all) = (escape(left), escape(right), one + two);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{all}\" height=\"20\" role=\"img\" aria-label=\"{left}: {right}\">\
         <rect width=\"{one}\" height=\"20\" fill=\"#333\"/><rect x=\"{one}\" width=\"{two}\" height=\"20\" fill=\"{colour}\"/>\
         <g fill=\"#fff\" font-family=\"Verdana,sans-serif\" font-size=\"11\"><text x=\"6\" y=\"14\">{left}</text>\
         <text x=\"{}\" y=\"14\">{right}</text></g></svg>",
        one + 6
    )
}

/// Where an exported page lies in its folder.
#[must_use]
pub fn file(page: &Page) -> PathBuf {
    match page {
        Page::Overview => PathBuf::from("index.html"),
        page => PathBuf::from(format!("{}.html", page.path())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_found_at_its_path() {
        let pages = [
            Page::Overview,
            Page::Job(7),
            Page::Test(1),
            Page::Flakes,
            Page::Failures,
            Page::Failure(3),
            Page::Pulls,
            Page::Pull("a".to_owned(), "b.c".to_owned(), 4),
            Page::Performance,
            Page::Series(9),
            Page::Cost,
            Page::Security,
        ];
        for page in pages {
            assert_eq!(Page::at(&page.path()), Some(page));
        }
        for wrong in ["job", "job/", "job/x", "job/-1", "job/99999999999999999999", "../etc", "pull/a/../4", "job/1/2"]
        {
            assert_eq!(Page::at(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_badge_escapes_what_it_says() {
        let badge = badge("<script>\"&", "passed");
        assert!(badge.contains("&lt;script&gt;&quot;&amp;") && !badge.contains("<script>"));
    }

    #[test]
    fn links_that_were_collected_lead_to_the_web_only() {
        let links = Links::Files(0);
        let age = Age { collected: None, seconds: None, problems: Vec::new() };
        let frame = Frame { title: "", age, current: "", path: String::new(), links: &links };
        assert_eq!(frame.outside("https://example.org/1"), "https://example.org/1");
        for wrong in ["javascript:alert(1)", "data:text/html,x", "//x", " https://x", "file:///etc/passwd"] {
            assert_eq!(frame.outside(wrong), "#");
        }
    }
}
