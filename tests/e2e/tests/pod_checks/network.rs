//! What containers see of the pod's network.

use crate::{Check, holds, same};

pub(crate) const CHECKS: &[Check] = &[
    ("the_link_has_the_networks_mtu", |b| holds(&b.exec("ip link show eth0")?.1, "mtu 1400")),
    ("the_link_is_up", |b| holds(&b.exec("ip link show eth0")?.1, "UP")),
    ("the_address_is_the_one_that_is_told", |b| {
        let address = b.pod.status().map_err(|error| error.1)?.network.ip.clone();
        holds(&b.exec("ip -4 addr show eth0")?.1, &address)
    }),
    ("there_is_a_default_route", |b| holds(&b.exec("ip route")?.1, "default via 10.88.0.1")),
    ("loopback_has_both_addresses", |b| {
        let output = b.exec("ip addr show lo")?.1;
        holds(&output, "127.0.0.1/8")?;
        holds(&output, "::1/128")
    }),
    ("loopback_answers", |b| same(b.exec("ping -c 1 -W 5 127.0.0.1 >/dev/null")?.0, 0)),
    ("the_gateway_answers", |b| same(b.exec("ping -c 1 -W 5 10.88.0.1 >/dev/null")?.0, 0)),
    ("the_gateway_answers_by_version_6", |b| same(b.exec("busybox ping6 -c 1 -W 5 fd00:88::1 >/dev/null")?.0, 0)),
    ("containers_share_the_address", |b| {
        let own = b.exec("ip -o -4 addr show eth0")?.1;
        same(b.printed("address", "ip -o -4 addr show eth0", |_| {})?, own)
    }),
    ("a_port_of_one_container_is_anothers", |b| {
        let text = |error: coracle_e2e::cri::CriError| error.1;
        let script = "httpd -p 127.0.0.1:7070 -h /etc; echo serves; sleep 1000";
        let id = b.pod.start("serves", &["sh", "-c", script], |_| {}).map_err(text)?;
        b.pod.await_log("serves", "serves");
        let output = b.exec("guest-probe get 127.0.0.1:7070 /group")?.1;
        b.cri.stop(&id, 0).map_err(text)?;
        holds(&output, "root:x:0")
    }),
    ("a_port_below_1024_where_the_pods_sysctl_allows_it", |b| {
        let change = |config: &mut coracle_e2e::cri::msg::ContainerConfig| {
            let security = crate::security(config);
            security.run_as_username = "app".into();
            security.capabilities.mut_or_insert_default().drop_capabilities = vec!["ALL".into()];
        };
        let script = "httpd -p 127.0.0.1:81 -h /etc && guest-probe get 127.0.0.1:81 /group | grep -c root:x:0";
        same(b.printed("low-port", script, change)?, "1\n".into())
    }),
    ("names_are_looked_up_where_the_pod_says", |b| {
        let output = b.exec("cat /etc/resolv.conf")?.1;
        holds(&output, "search one.example two.example")?;
        holds(&output, "nameserver 10.9.8.7")?;
        holds(&output, "options ndots:5")
    }),
    ("a_large_packet_comes_back", |b| same(b.exec("ping -c 1 -W 5 -s 4000 10.88.0.1 >/dev/null")?.0, 0)),
    ("the_links_traffic_is_counted", |b| {
        let count = || {
            b.exec("cat /sys/class/net/eth0/statistics/tx_bytes")
                .map(|output| output.1.trim().parse::<u64>().unwrap_or(0))
        };
        let before = count()?;
        same(b.exec("ping -c 3 -W 5 10.88.0.1 >/dev/null")?.0, 0)?;
        same(count()? > before, true)
    }),
];
