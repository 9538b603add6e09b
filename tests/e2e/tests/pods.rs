//! Pods through containerd's CRI, as kubelet makes them.

use coracle_e2e::{Containerd, Cri, Host, Pod};

#[test]
fn a_pod_runs_containers_beside_one_another() {
    let host = Host::new();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod =
        Pod::run(&cri, "coracle", "p", |config| config.log_directory = host.folder.display().to_string()).unwrap();
    assert_eq!(pod.status().unwrap().state, 0, "ready");
    let one = pod.start("one", &["sh", "-c", "echo out; echo $HOSTNAME; sleep 1000"], |_| {}).unwrap();
    let two = pod.start("two", &["sh", "-c", "exit 3"], |_| {}).unwrap();
    assert_eq!(cri.ended(&two).exit_code, 3);
    let (code, out, err) = cri.exec(&one, &["sh", "-c", "hostname; echo err >&2; exit 7"]).unwrap();
    assert_eq!((code, out.as_str(), err.as_str()), (7, "p\n", "err\n"));
    assert_eq!(pod.log("one"), "out\np\n");
    cri.stop(&one, 1).unwrap();
    cri.remove(&one).unwrap();
    cri.remove(&two).unwrap();
    // A pod whose last container has ended takes another one.
    let three = pod.start("three", &["sh", "-c", "exit 4"], |_| {}).unwrap();
    assert_eq!(cri.ended(&three).exit_code, 4);
    pod.remove().unwrap();
    drop(containerd);
    host.audit();
}
