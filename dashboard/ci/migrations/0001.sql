-- What was collected. Moments are seconds since 1970, UTC. Nothing here is worked out; see evidence_* for that.
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE repository (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE workflow (
    id INTEGER PRIMARY KEY, repository INTEGER NOT NULL REFERENCES repository, path TEXT NOT NULL, name TEXT NOT NULL,
    UNIQUE (repository, path)
);
CREATE TABLE commits (sha TEXT PRIMARY KEY, title TEXT NOT NULL, author TEXT NOT NULL, made INTEGER) WITHOUT ROWID;
CREATE TABLE run (
    id INTEGER PRIMARY KEY, external INTEGER NOT NULL UNIQUE, workflow INTEGER NOT NULL REFERENCES workflow,
    number INTEGER, event TEXT NOT NULL, branch TEXT NOT NULL, sha TEXT NOT NULL, pull INTEGER, title TEXT NOT NULL,
    attempt INTEGER NOT NULL, status TEXT NOT NULL, conclusion TEXT, created INTEGER NOT NULL, updated INTEGER,
    link TEXT NOT NULL,
    -- Of which attempt all jobs are stored; 0 where that is not so.
    whole INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX run_created ON run (created);
CREATE INDEX run_sha ON run (sha);
CREATE INDEX run_pull ON run (pull, created) WHERE pull IS NOT NULL;
-- A job's identity. What it was called before is renamed to what it is called now by a person (rename).
CREATE TABLE job (id INTEGER PRIMARY KEY, workflow INTEGER NOT NULL REFERENCES workflow, name TEXT NOT NULL, UNIQUE (workflow, name));
CREATE TABLE rename (
    old INTEGER NOT NULL REFERENCES job, new INTEGER NOT NULL REFERENCES job, likeness REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('proposed', 'confirmed', 'refused')), decided INTEGER, PRIMARY KEY (old, new)
) WITHOUT ROWID;
-- One attempt of one job.
CREATE TABLE execution (
    id INTEGER PRIMARY KEY, external INTEGER NOT NULL UNIQUE, run INTEGER NOT NULL REFERENCES run,
    -- What it counts as, and what it was called when it ran.
    job INTEGER NOT NULL REFERENCES job, named INTEGER NOT NULL REFERENCES job,
    attempt INTEGER NOT NULL, outcome INTEGER NOT NULL, created INTEGER, started INTEGER, completed INTEGER,
    label TEXT NOT NULL, runner TEXT NOT NULL, link TEXT NOT NULL,
    -- An earlier attempt, told again with a rerun of others: it began when that one did.
    retold INTEGER NOT NULL DEFAULT 0,
    -- Whether its log has been read.
    has_log INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX execution_job ON execution (job, created);
CREATE INDEX execution_run ON execution (run, job);
CREATE TABLE step (
    execution INTEGER NOT NULL REFERENCES execution, number INTEGER NOT NULL, name TEXT NOT NULL, outcome INTEGER NOT NULL,
    started INTEGER, completed INTEGER, PRIMARY KEY (execution, number)
) WITHOUT ROWID;
CREATE TABLE test (id INTEGER PRIMARY KEY, repository INTEGER NOT NULL REFERENCES repository, name TEXT NOT NULL, UNIQUE (repository, name));
CREATE TABLE result (
    test INTEGER NOT NULL REFERENCES test, execution INTEGER NOT NULL REFERENCES execution, outcome INTEGER NOT NULL, millis INTEGER,
    PRIMARY KEY (test, execution)
) WITHOUT ROWID;
CREATE INDEX result_failed ON result (execution) WHERE outcome = 1;
-- What a failure said: of a test, or of the whole job where test is 0.
CREATE TABLE failure (
    execution INTEGER NOT NULL REFERENCES execution, test INTEGER NOT NULL, signature INTEGER NOT NULL REFERENCES signature,
    text TEXT NOT NULL, PRIMARY KEY (execution, test)
) WITHOUT ROWID;
CREATE INDEX failure_signature ON failure (signature);
CREATE TABLE signature (id INTEGER PRIMARY KEY, pattern TEXT NOT NULL UNIQUE);
CREATE TABLE required (repository INTEGER NOT NULL REFERENCES repository, name TEXT NOT NULL, PRIMARY KEY (repository, name)) WITHOUT ROWID;
CREATE TABLE environment (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE);
CREATE TABLE series (id INTEGER PRIMARY KEY, repository INTEGER NOT NULL REFERENCES repository, suite TEXT NOT NULL, name TEXT NOT NULL,
    unit TEXT NOT NULL, UNIQUE (repository, suite, name, unit));
CREATE TABLE point (
    series INTEGER NOT NULL REFERENCES series, at INTEGER NOT NULL, sha TEXT NOT NULL, environment INTEGER NOT NULL REFERENCES environment,
    value REAL NOT NULL, raw TEXT NOT NULL, execution INTEGER, PRIMARY KEY (series, at, sha, environment)
) WITHOUT ROWID;
-- Facts that gates have found: audits, inventories, coverage.
CREATE TABLE assessment (repository INTEGER NOT NULL REFERENCES repository, gate TEXT NOT NULL, at INTEGER NOT NULL, sha TEXT NOT NULL,
    state TEXT NOT NULL, summary TEXT NOT NULL, PRIMARY KEY (repository, gate, at)) WITHOUT ROWID;

-- Alerts, which outlive each calculation.
CREATE TABLE alert (
    id INTEGER PRIMARY KEY, job INTEGER NOT NULL REFERENCES job, opened INTEGER NOT NULL, recovered INTEGER
);
CREATE INDEX alert_open ON alert (job) WHERE recovered IS NULL;
-- What a sink is still to be told. A sink is named by the SHA-256 of its address, which may be a secret.
CREATE TABLE outbox (id INTEGER PRIMARY KEY, sink TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE mute (job INTEGER PRIMARY KEY REFERENCES job, until INTEGER NOT NULL, reason TEXT NOT NULL);

-- What is worked out of the above after each collection; it can be thrown away at any time.
CREATE TABLE evidence_job (
    job INTEGER PRIMARY KEY, repository TEXT NOT NULL, workflow TEXT NOT NULL, name TEXT NOT NULL, is_required INTEGER NOT NULL, owner TEXT NOT NULL, contact TEXT NOT NULL,
    -- Of the branch: passed, failed, not run; on changes where it never ran there; gone where its workflow runs without it.
    state TEXT NOT NULL, since INTEGER, streak INTEGER NOT NULL, first_bad TEXT, last_good TEXT, last INTEGER,
    failures INTEGER NOT NULL, verdicts INTEGER NOT NULL, flaky INTEGER NOT NULL, compared INTEGER NOT NULL, rerun_passes INTEGER NOT NULL,
    median_seconds INTEGER, trend REAL, trend_since TEXT, dots TEXT NOT NULL, advice TEXT NOT NULL, advice_reason TEXT NOT NULL
);
CREATE TABLE evidence_flake (
    test INTEGER NOT NULL, job INTEGER NOT NULL, flaky INTEGER NOT NULL, compared INTEGER NOT NULL, failures INTEGER NOT NULL, runs INTEGER NOT NULL,
    commits TEXT NOT NULL, last INTEGER NOT NULL, PRIMARY KEY (test, job)
) WITHOUT ROWID;
CREATE TABLE evidence_cluster (
    signature INTEGER PRIMARY KEY, failures INTEGER NOT NULL, jobs INTEGER NOT NULL, tests INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    example INTEGER NOT NULL, issue TEXT NOT NULL
);
CREATE TABLE evidence_cost_label (day INTEGER NOT NULL, label TEXT NOT NULL, executions INTEGER NOT NULL, reruns INTEGER NOT NULL, seconds INTEGER NOT NULL,
    rerun_seconds INTEGER NOT NULL, queue_seconds INTEGER NOT NULL, queued INTEGER NOT NULL, queue_worst INTEGER NOT NULL, PRIMARY KEY (day, label)) WITHOUT ROWID;
CREATE TABLE evidence_cost_job (week INTEGER NOT NULL, job INTEGER NOT NULL, executions INTEGER NOT NULL, seconds INTEGER NOT NULL,
    rerun_seconds INTEGER NOT NULL, PRIMARY KEY (week, job)) WITHOUT ROWID;
CREATE TABLE evidence_cost_pull (repository TEXT NOT NULL, pull INTEGER NOT NULL, runs INTEGER NOT NULL, executions INTEGER NOT NULL, seconds INTEGER NOT NULL,
    rerun_seconds INTEGER NOT NULL, failed INTEGER NOT NULL, last INTEGER NOT NULL, title TEXT NOT NULL, PRIMARY KEY (repository, pull)) WITHOUT ROWID;
