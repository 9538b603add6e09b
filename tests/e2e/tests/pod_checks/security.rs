//! Privileges: what is given, and what is not.

use coracle_e2e::cri::msg;
use protobuf::MessageField;

use crate::{Check, holds, same, security};

fn number(value: i64) -> MessageField<msg::Int64Value> {
    MessageField::some(msg::Int64Value { value, ..Default::default() })
}

pub(crate) const CHECKS: &[Check] = &[
    ("privileged_has_the_highest_capabilities", |b| {
        let script = "grep -E 'Cap(Eff|Bnd)' /proc/self/status";
        let output = b.printed("priv-caps", script, |config| security(config).privileged = true)?;
        let value = |line: &str| line.split_whitespace().nth(1).and_then(|hex| u64::from_str_radix(hex, 16).ok());
        let sets: Vec<u64> = output.lines().filter_map(value).collect();
        // CAP_SYS_ADMIN is 21, CAP_SYS_MODULE 16 (linux/capability.h).
        same(sets.len() == 2 && sets[0] == sets[1] && sets[0] & (1 << 21) != 0, true)
    }),
    ("privileged_sees_masked_paths", |b| {
        // A mask over a file is the null device, which holds nothing.
        let script = "mount | grep -c '/proc/kcore' || true";
        same(b.printed("priv-mask", script, |config| security(config).privileged = true)?, "0\n".into())
    }),
    ("privileged_may_mount", |b| {
        let script = "busybox mount -t tmpfs none /tmp && touch /tmp/x && busybox umount /tmp && echo done";
        same(b.printed("priv-mount", script, |config| security(config).privileged = true)?, "done\n".into())
    }),
    ("nobody_else_may_mount", |b| {
        let (code, output) = b.run("no-mount", "busybox mount -t tmpfs none /tmp 2>&1", |_| {})?;
        if code == 0 { Err("it was mounted".into()) } else { holds(&output, "denied") }
    }),
    ("nobody_may_set_the_clock", |b| holds(&b.run("no-clock", "date -s 2000-01-01 2>&1", |_| {})?.1, "not permitted")),
    ("nobody_may_load_modules", |b| {
        let (code, _) = b.run("no-modules", "echo x >/tmp/m.ko; busybox insmod /tmp/m.ko 2>/dev/null", |_| {})?;
        same(code != 0, true)
    }),
    ("nobody_may_change_the_host_name", |b| {
        let (code, _) = b.run("no-name", "hostname other 2>/dev/null", |_| {})?;
        same((code != 0, b.exec("hostname")?.1.as_str()), (true, "checks\n"))
    }),
    ("one_capability_less", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            security(config).capabilities.mut_or_insert_default().drop_capabilities = vec!["CHOWN".into()];
        };
        holds(&b.printed("less", "grep CapEff /proc/self/status", change)?, "00000000a80425fa")
    }),
    ("a_capability_that_is_dropped_is_not_there_to_use", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            security(config).capabilities.mut_or_insert_default().drop_capabilities = vec!["CHOWN".into()];
        };
        same(b.run("no-chown", "touch /f; busybox chown 5 /f 2>/dev/null", change)?.0, 1)
    }),
    ("only_what_was_added_to_nothing", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            let capabilities = security(config).capabilities.mut_or_insert_default();
            (capabilities.drop_capabilities, capabilities.add_capabilities) =
                (vec!["ALL".into()], vec!["NET_BIND_SERVICE".into()]);
        };
        holds(&b.printed("only", "grep CapEff /proc/self/status", change)?, "0000000000000400")
    }),
    ("a_user_has_no_effective_capability", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).run_as_user = number(1000);
        let output = b.printed("user-caps", "grep -E 'Cap(Eff|Amb)' /proc/self/status", change)?;
        holds(&output, "CapEff:\t0000000000000000")?;
        holds(&output, "CapAmb:\t0000000000000000")
    }),
    ("a_user_can_not_read_what_is_roots", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).run_as_user = number(1000);
        let (code, _) = b.run(
            "user-read",
            "cat /proc/1/environ >/dev/null && ! cat /root/x 2>/dev/null && ! (echo x >/etc/passwd) 2>/dev/null",
            change,
        )?;
        same(code, 0)
    }),
    ("the_users_groups_of_the_image", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).run_as_username = "app".into();
        let output = b.printed("image-groups", "id -G", change)?;
        for group in ["1000", "50", "29"] {
            holds(&output, group)?;
        }
        Ok(())
    }),
    ("a_user_that_the_image_does_not_know", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).run_as_user = number(54321);
        same(b.printed("stranger", "id -u; id -g", change)?, "54321\n0\n".into())
    }),
    ("no_new_privileges_is_for_execs_too", |b| {
        let change = |config: &mut msg::ContainerConfig| security(config).no_new_privs = true;
        let id = b.pod.start("nnp-exec", &["sleep", "1000"], change).map_err(|error| error.1)?;
        let output = b.cri.exec(&id, &["grep", "NoNewPrivs", "/proc/self/status"]).map_err(|error| error.1)?.1;
        b.cri.stop(&id, 0).map_err(|error| error.1)?;
        holds(&output, "1")
    }),
    ("a_seccomp_profile_of_the_node", |b| {
        let path = b.folder.join("profile.json");
        let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["keyctl"],"action":"SCMP_ACT_ERRNO","errnoRet":28}]}"#;
        std::fs::write(&path, profile).map_err(|error| error.to_string())?;
        let change = |config: &mut msg::ContainerConfig| {
            let localhost_ref = path.display().to_string();
            let profile = msg::SecurityProfile { profile_type: 2, localhost_ref, ..Default::default() };
            security(config).seccomp = MessageField::some(profile);
        };
        let output = b.printed("profile", "guest-probe call keyctl 0 2>&1; guest-probe call getpid 0", change)?;
        same(output, "No space left on device (os error 28)\nok\n".into())
    }),
    ("files_of_the_kernel_are_masked", |b| {
        let change = |config: &mut msg::ContainerConfig| {
            security(config).masked_paths = vec!["/proc/interrupts".into(), "/proc/keys".into()];
        };
        same(b.printed("kernel-files", "wc -c </proc/interrupts; wc -c </proc/keys", change)?, "0\n0\n".into())
    }),
    ("the_runtimes_program_can_not_be_reached", |b| {
        // The way of CVE-2019-5736: the program that made the container, by the link in /proc.
        let script = "for p in /proc/[0-9]*; do readlink $p/exe; done | grep -E 'coracle|runc|agent' || echo clean";
        same(b.exec(script)?.1, "clean\n".into())
    }),
    ("nothing_of_the_runtime_is_open", |b| {
        let script = "for f in /proc/$$/fd/*; do readlink $f; done | grep -v -E '^(pipe:|socket:|/dev/(null|pts))' || echo clean";
        same(b.exec(script)?.1, "clean\n".into())
    }),
    ("other_namespaces_can_not_be_seen", |b| {
        let (code, _) = b.run("ns", "busybox nsenter -t 1 -m true 2>/dev/null", |_| {})?;
        same(code != 0, true)
    }),
];
