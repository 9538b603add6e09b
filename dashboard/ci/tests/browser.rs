//! The pages in a real browser: each one, light and dark, wide and narrow, with its charts and filters, by keyboard, without scripts, and as files.
//! Needs Chromium's driver and axe-core: `cargo xtask test --lane board` brings both.

mod made_up;

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use base64::Engine as _;
use coracle_ci::collect::{Collected, collect};
use coracle_ci::settings::{Repository, Settings};
use coracle_ci::store::{Point, Store};
use coracle_ci::{evidence, export, serve, times};
use made_up::{FIRST, MadeUp, PROJECT, point};
use serde_json::{Value, json};

/// A browser, driven by the WebDriver protocol (W3C, 2018).
struct Browser {
    driver: Child,
    runtime: tokio::runtime::Runtime,
    client: reqwest::Client,
    session: String,
}

impl Browser {
    fn start() -> Self {
        let program = std::env::var("CORACLE_TEST_CHROMEDRIVER").unwrap_or_else(|_| "chromedriver".to_owned());
        let mut driver = Command::new(&program).arg("--port=0").stdout(Stdio::piped()).spawn().expect(&program);
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines().map_while(Result::ok);
        let started = lines.find(|line| line.contains("started successfully on port")).expect("the driver's port");
        let port = started.trim_end_matches('.').rsplit(' ').next().unwrap().to_owned();
        // Nobody reads on: what it says later must not stop it.
        std::thread::spawn(move || lines.for_each(drop));
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut browser = Self {
            driver,
            runtime,
            client: reqwest::Client::new(),
            session: format!("http://127.0.0.1:{port}/session"),
        };
        let flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",
        ];
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": flags }, "goog:loggingPrefs": { "browser": "ALL" } } } });
        let made = browser.ask("POST", "", capabilities);
        browser.session = format!("{}/{}", browser.session, made["sessionId"].as_str().unwrap());
        browser
    }

    fn ask(&self, method: &str, path: &str, body: Value) -> Value {
        let address = format!("{}{path}", self.session);
        let answer = self.runtime.block_on(async {
            let request = self.client.request(method.parse().unwrap(), &address);
            let request = if method == "GET" { request } else { request.body(body.to_string()) };
            request.send().await.unwrap().text().await.unwrap()
        });
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["value"].get("error").is_none(), "{method} {path}: {}", answer["value"]);
        answer["value"].clone()
    }

    fn open(&self, address: &str) {
        self.ask("POST", "/url", json!({ "url": address }));
    }

    fn run(&self, script: &str) -> Value {
        self.ask("POST", "/execute/sync", json!({ "script": script, "args": [] }))
    }

    fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.ask("POST", "/goog/cdp/execute", json!({ "cmd": command, "params": parameters }))
    }

    /// Sets the screen's width and the scheme that its user prefers.
    fn look(&self, width: u32, scheme: &str) {
        let screen = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", screen);
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", features);
    }

    fn screenshot(&self, name: &str) {
        let Ok(folder) = std::env::var("CORACLE_TEST_SCREENSHOTS") else { return };
        let image = self.ask("GET", "/screenshot", Value::Null);
        let image = base64::engine::general_purpose::STANDARD.decode(image.as_str().unwrap()).unwrap();
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(Path::new(&folder).join(format!("{name}.png")), image).unwrap();
    }

    /// What the browser complains of: scripts that fail, rules that are broken, files that are missing.
    fn complaints(&self) -> Vec<String> {
        let log = self.ask("POST", "/se/log", json!({ "type": "browser" }));
        let is_bad = |entry: &&Value| entry["level"] == "SEVERE" || entry["level"] == "WARNING";
        log.as_array().unwrap().iter().filter(is_bad).map(|entry| entry["message"].to_string()).collect()
    }

    fn keys(&self, keys: &str) {
        let actions: Vec<Value> = keys
            .chars()
            .flat_map(|key| {
                [
                    json!({ "type": "keyDown", "value": key.to_string() }),
                    json!({ "type": "keyUp", "value": key.to_string() }),
                ]
            })
            .collect();
        self.ask("POST", "/actions", json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] }));
    }

    /// Faults of accessibility that axe-core calls serious or critical.
    fn barriers(&self, axe: &str) -> Vec<String> {
        self.run(axe);
        let script = "const done = arguments[arguments.length - 1];
            axe.run(document, { resultTypes: ['violations'] }).then((found) => done(found.violations
                .filter((one) => ['serious', 'critical'].includes(one.impact))
                .map((one) => `${one.id}: ${one.nodes.slice(0, 3).map((node) => node.html).join(' | ')}`)), (error) => done([String(error)]));";
        let found = self.ask("POST", "/execute/async", json!({ "script": script, "args": [] }));
        found.as_array().unwrap().iter().map(|one| one.as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.runtime.block_on(async { self.client.delete(&self.session).send().await });
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// The board, served, and its folder.
struct Board {
    folder: tempfile::TempDir,
    root: String,
    _runtime: tokio::runtime::Runtime,
}

impl Board {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ci.toml");
        let text =
            "title = 'Made-up CI'\n[[owner]]\njobs = 'tdx'\nname = 'Ann'\n[[owner]]\njobs = 'qemu'\nname = 'Bob'\n
            [[known_issue]]\npattern = 'timeout'\nlink = 'https://example.org/7'\n
            [[deprecation]]\nwhat = 'the remote driver'\nsince = '1.0'\nremoved_in = '1.2'\n";
        std::fs::write(&path, text).unwrap();
        let settings = Settings::read(Some(&path)).unwrap();
        let database = folder.path().join("ci.db");
        let mut store = Store::open(&database).unwrap();
        let mut made = MadeUp { jobs: 24, nights: NIGHTS, tests: 240, failures: 50 };
        let repository = Repository::named(PROJECT);
        collect(&mut store, &mut made, &settings, &repository, 0, &mut Collected::default()).unwrap();
        let points: Vec<Point> = (0..NIGHTS).map(|night| point(night, NIGHTS, 40.0)).collect();
        store.store_points(PROJECT, &points, None).unwrap();
        evidence::derive(&mut store, &settings, FIRST + 60 * times::DAY).unwrap();
        evidence::set_collected(&mut store, times::now() - 3 * 3_600).unwrap();
        export::export(&store, &settings, &folder.path().join("site")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (ready, address) = std::sync::mpsc::channel();
        let options =
            serve::ServeOptions { database, listen: SocketAddr::from(([127, 0, 0, 1], 0)), root: "/ci/".to_owned() };
        runtime.spawn(serve::serve(options, settings, std::future::pending(), move |at| ready.send(at).unwrap()));
        let address = address.recv().unwrap();
        Self { folder, root: format!("http://{address}/ci/"), _runtime: runtime }
    }
}

/// How long the project has been there.
const NIGHTS: i64 = 60;

const PAGES: [(&str, &str); 13] = [
    ("overview", ""),
    ("red", "?status=failed&kind=required"),
    ("job", "job/3"),
    ("test", "test/5"),
    ("flakes", "flakes"),
    ("failures", "failures?q=timeout"),
    ("failure", "failure/1"),
    ("pulls", "pulls"),
    ("pull", "pull/made-up/project/105"),
    ("performance", "performance"),
    ("series", "series/1"),
    ("cost", "cost?days=90"),
    ("security", "security"),
];

#[test]
#[ignore = "needs a browser: cargo xtask test --lane board"]
fn each_page_is_whole_for_everybody() {
    let axe: PathBuf = std::env::var_os("CORACLE_TEST_AXE").expect("CORACLE_TEST_AXE: axe-core's axe.min.js").into();
    let axe = std::fs::read_to_string(&axe).unwrap();
    let (board, browser) = (Board::start(), Browser::start());
    let mut faults = Vec::new();
    for (scheme, width) in [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)] {
        browser.look(width, scheme);
        for (name, path) in PAGES {
            browser.open(&format!("{}{path}", board.root));
            let at = format!("{name}, {scheme}, {width}");
            let mut fault = |text: String| faults.push(format!("{at}: {text}"));
            let seen = browser.run(
                "const tables = [...document.querySelectorAll('table.chart')].filter((one) => one.tBodies[0].rows.length > 1);
                 const painted = [...document.querySelectorAll('.plot canvas')].filter((one) => {
                    const data = one.getContext('2d').getImageData(0, 0, one.width, one.height).data;
                    return data.some((value) => value !== 0);
                 });
                 return { heads: document.querySelectorAll('h1').length, current: document.querySelectorAll('nav [aria-current]').length,
                    over: document.documentElement.scrollWidth - innerWidth, charts: tables.length, painted: painted.length,
                    ground: getComputedStyle(document.body).backgroundColor, bold: document.querySelectorAll('main b, main i').length,
                    tiles: document.querySelectorAll('.tiles b').length };",
            );
            if seen["heads"] != 1 || seen["current"] != 1 {
                fault(format!("{seen}"));
            }
            if seen["over"].as_i64().unwrap() > 0 {
                fault(format!("wider than the screen by {}", seen["over"]));
            }
            if seen["charts"] != seen["painted"] {
                fault(format!("{} charts of {}", seen["painted"], seen["charts"]));
            }
            if seen["bold"] != seen["tiles"] {
                fault("a collected name became markup".to_owned());
            }
            let is_light = seen["ground"].as_str().unwrap().starts_with("rgb(25");
            if is_light != (scheme == "light") {
                fault(format!("ground {}", seen["ground"]));
            }
            browser.barriers(&axe).into_iter().for_each(&mut fault);
            browser.complaints().into_iter().for_each(&mut fault);
            browser.screenshot(&format!("{name}-{scheme}-{width}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn rows(browser: &Browser) -> Vec<String> {
    let names = browser.run(
        "return [...document.querySelectorAll('table.rows tbody tr')].filter((row) => !row.hidden).map((row) => row.dataset.status + '|' + row.dataset.owner + '|' + row.dataset.name);",
    );
    names.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

#[test]
#[ignore = "needs a browser: cargo xtask test --lane board"]
fn filters_are_permalinks_served_and_as_files() {
    let (board, browser) = (Board::start(), Browser::start());
    browser.look(1280, "light");
    let file = format!("file://{}/site/index.html", board.folder.path().display());
    for address in [&board.root, &file] {
        browser.open(address);
        let all = rows(&browser);
        assert_eq!(all.len(), 48, "{address}");
        // By hand: words and choices, then the button.
        browser.run(
            "const form = document.querySelector('form.filter'); form.elements.q.value = 'QEMU'; form.elements.owner.value = 'Bob';
             form.querySelector('button').click();",
        );
        let by_hand = rows(&browser);
        let link = browser.run("return location.href").as_str().unwrap().to_owned();
        assert!(link.contains("q=QEMU") && link.contains("owner=Bob"), "{link}");
        assert!(!by_hand.is_empty() && by_hand.len() < all.len());
        assert!(by_hand.iter().all(|row| row.contains("|Bob|") && row.contains("qemu")), "{by_hand:?}");
        // By its link, later.
        browser.open("about:blank");
        browser.open(&link);
        assert_eq!(rows(&browser), by_hand);
        let shown = browser.run("return [document.querySelector('form.filter').elements.owner.value, document.getElementById('shown').textContent]");
        assert_eq!(shown, json!(["Bob", format!("{} jobs", by_hand.len())]));
        for state in ["failed", "passed", "on changes", "slower"] {
            browser.open(&format!("{address}?status={}", state.replace(' ', "+")));
            let left = rows(&browser);
            assert!(
                !left.is_empty() && left.iter().all(|row| row.split('|').next().unwrap().contains(state)),
                "{state}: {left:?}"
            );
        }
        assert!(browser.complaints().is_empty());
    }
    // Two commits of a series, compared.
    browser.open(&format!("{}series/1", board.root));
    let (a, b) = (point(10, NIGHTS, 40.0).sha, point(50, NIGHTS, 40.0).sha);
    browser.run(&format!(
        "const form = document.querySelector('form.filter'); form.elements.a.value = '{a}'; form.elements.b.value = '{b}'; form.querySelector('button').click();"
    ));
    let told = browser.run("return document.querySelector('p[role=status]').textContent");
    assert!(told.as_str().unwrap().contains("larger, by +"), "{told}");
}

#[test]
#[ignore = "needs a browser: cargo xtask test --lane board"]
fn pages_are_used_by_keyboard_and_read_without_scripts() {
    let (board, browser) = (Board::start(), Browser::start());
    browser.look(1280, "light");
    browser.open(&board.root);
    browser.keys("\u{e004}");
    assert_eq!(browser.run("return document.activeElement.className"), "skip");
    browser.keys("\u{e007}");
    assert_eq!(browser.run("return document.activeElement.id"), "main");
    // The first link behind it is a tile, and opens.
    browser.keys("\u{e004}\u{e007}");
    assert_eq!(browser.run("return location.search"), "?status=failed");
    // A result's mark leads to its attempt, whose reasons lie open.
    browser.open(&format!("{}?status=failed", board.root));
    browser.run("document.querySelector('.dot.s-failed').click()");
    let open = browser.run("return [location.pathname.startsWith('/ci/job/'), document.querySelector(location.hash).querySelectorAll('details[open]').length > 0]");
    assert_eq!(open, json!([true, true]));

    browser.devtools("Emulation.setScriptExecutionDisabled", json!({ "value": true }));
    for (name, path) in PAGES {
        browser.open(&format!("{}{path}", board.root));
        let text = browser.ask("GET", "/source", Value::Null);
        let text = text.as_str().unwrap();
        assert!(text.contains("<h1>") && !text.contains("class=\"plot\""), "{name}");
        assert!(text.contains("(3 h 0 min ago)"), "{name}");
        if name == "job" {
            assert!(text.contains("<table class=\"chart\""));
        }
    }
    browser.screenshot("overview-without-scripts");
}
