//! stress-ng of the host's in a container (Kata: tests/stability/stressng.sh; the same stressors and times).

use std::time::Instant;

use coracle_e2e::Host;

const RUNS: [&str; 4] = [
    "--iomix 1 --timeout 20s",
    "--cpu 2 --vm 4 --timeout 300s",
    "--matrix 0 --timeout 60s",
    "--cpu 2 --matrix 1 --mq 3 --timeout 180s",
];

pub(crate) fn stress() {
    let host = Host::new();
    let image = host.image();
    // The program and its libraries are the host's: what it does is the guest's to bear.
    let mut words = vec!["run", "--detach", "--name", "stress", "--memory", "2g"];
    for volume in ["/usr:/usr:ro", "/usr/lib:/lib:ro", "/usr/lib64:/lib64:ro"] {
        words.extend(["--volume", volume]);
    }
    words.extend([&image, "sleep", "100000"]);
    let started = host.coracle_outcome(&words);
    assert_eq!(started.code, 0, "{started:?}");
    for run in RUNS {
        let start = Instant::now();
        let script = format!("cd /tmp && exec /usr/bin/stress-ng --temp-path /tmp {run}");
        let outcome = host.coracle_outcome(&["exec", "stress", "sh", "-c", &script]);
        println!("stress-ng {run}: exit status {} after {:.0} s", outcome.code, start.elapsed().as_secs_f64());
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }
    assert_eq!(host.coracle_outcome(&["exec", "stress", "true"]).code, 0, "the pod goes on");
    assert_eq!(host.coracle_outcome(&["rm", "--force", "stress"]).code, 0);
    host.audit();
}
