//! System calls that a process gives up for good (seccomp), and with it all that it starts.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// What no process of a pod ever needs, with whatever privileges (bpf(2) is not among it: the shim steers the pod's loopback by it): what changes the host's kernel or clock, looks into other processes, or is
/// a frequent way into a kernel. Who calls one is told that it may not.
const NEVER: &[libc::c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

/// What the server of a guest's sockets does once it has started: it reads and writes, takes connections, makes ones to sockets in the pod's
/// folder, maps the guest's memory, and makes threads.
const VSOCK: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// `FIONBIO` (asm-generic/ioctls.h): the standard library's way to have a socket not wait.
const FIONBIO: u64 = 0x5421;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Gives up what no process of a pod ever needs.
///
/// # Errors
/// Where the kernel takes no such list.
pub fn refuse_dangerous_calls() -> std::io::Result<()> {
    let rules: Rules = NEVER.iter().map(|number| (*number, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    apply(rules, SeccompAction::Allow, refused)
}

/// Leaves the server of a guest's sockets what it does. Any other call ends it.
///
/// # Errors
/// As [`refuse_dangerous_calls`].
pub fn leave_vsock_calls() -> std::io::Result<()> {
    // The C library looks for the host's rules of memory when it gives some back, and can do without.
    let denied = SeccompAction::Errno(libc::EACCES.unsigned_abs());
    apply([(libc::SYS_openat, Vec::new())].into(), SeccompAction::Allow, denied)?;
    let mut rules: Rules = VSOCK.iter().map(|number| (*number, Vec::new())).collect();
    let unix = u64::from(libc::AF_UNIX.unsigned_abs());
    rules.insert(libc::SYS_socket, vec![only(0, unix)?]);
    rules.insert(libc::SYS_ioctl, vec![only(1, FIONBIO)?]);
    rules.insert(libc::SYS_prctl, vec![only(0, u64::from(libc::PR_SET_NAME.unsigned_abs()))?]);
    // Threads, where the C library makes them by the older call; no processes.
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    let is_thread = SeccompCmpOp::MaskedEq(thread);
    rules.insert(libc::SYS_clone, vec![rule(0, SeccompCmpArgLen::Qword, is_thread, thread)?]);
    rules.insert(libc::SYS_tgkill, vec![only(2, u64::from(libc::SIGABRT.unsigned_abs()))?]);
    apply(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// A call with this number as an argument.
fn only(argument: u8, value: u64) -> std::io::Result<SeccompRule> {
    rule(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn rule(argument: u8, length: SeccompCmpArgLen, is: SeccompCmpOp, value: u64) -> std::io::Result<SeccompRule> {
    let condition = SeccompCondition::new(argument, length, is, value);
    condition.and_then(|condition| SeccompRule::new(vec![condition])).map_err(std::io::Error::other)
}

/// Sockets of this host's programs alone, and no programs for the kernel: those of a machine's (vsock) reach other guests from any network namespace.
///
/// # Errors
/// Where there can't be such a list.
pub(crate) fn local_sockets() -> std::io::Result<BpfProgram> {
    let unix = u64::from(libc::AF_UNIX.unsigned_abs());
    let others = rule(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, unix)?;
    let rules = [(libc::SYS_socket, vec![others]), (libc::SYS_bpf, Vec::new())].into();
    program(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM.unsigned_abs()))
}

fn program(rules: Rules, other: SeccompAction, listed: SeccompAction) -> std::io::Result<BpfProgram> {
    let target = TargetArch::try_from(std::env::consts::ARCH).map_err(std::io::Error::other)?;
    let filter = SeccompFilter::new(rules, other, listed, target).and_then(BpfProgram::try_from);
    filter.map_err(std::io::Error::other)
}

fn apply(rules: Rules, other: SeccompAction, listed: SeccompAction) -> std::io::Result<()> {
    seccompiler::apply_filter(&program(rules, other, listed)?).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How a child ends that gives calls up and then makes this one: with the number of its error, or by a signal.
    fn ends(
        give_up: fn() -> std::io::Result<()>,
        number: libc::c_long,
        arguments: [libc::c_long; 3],
    ) -> Result<i32, i32> {
        // SAFETY: the child makes system calls and the filter, and ends without going back.
        #[expect(unsafe_code, reason = "fork")]
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut code = 126;
            if rustix::thread::set_no_new_privs(true).is_ok() && give_up().is_ok() {
                let [one, two, three] = arguments;
                // SAFETY: the calls of these tests take no pointers but null, and numbers that are no descriptors.
                #[expect(unsafe_code, reason = "the test makes a system call by its number")]
                let result = unsafe { libc::syscall(number, one, two, three) };
                code = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(125) } else { 0 };
            }
            // SAFETY: it ends the child at once.
            #[expect(unsafe_code, reason = "_exit")]
            unsafe {
                libc::_exit(code)
            };
        }
        let mut status = 0;
        // SAFETY: the pointer is to a live variable; the child is ours.
        #[expect(unsafe_code, reason = "waitpid")]
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(waited, child);
        if libc::WIFSIGNALED(status) { Err(libc::WTERMSIG(status)) } else { Ok(libc::WEXITSTATUS(status)) }
    }

    #[test]
    fn no_process_of_a_pod_loads_modules_or_looks_into_another() {
        for number in [libc::SYS_finit_module, libc::SYS_ptrace, libc::SYS_kexec_load, libc::SYS_reboot] {
            assert_eq!(ends(refuse_dangerous_calls, number, [-1, -1, -1]), Ok(libc::EPERM), "{number}");
        }
        assert_eq!(ends(refuse_dangerous_calls, libc::SYS_getpid, [0; 3]), Ok(0));
        assert_eq!(ends(refuse_dangerous_calls, libc::SYS_read, [-1, 0, 0]), Ok(libc::EBADF));
    }

    #[test]
    fn a_monitor_has_no_sockets_but_local_ones() {
        let confine = || seccompiler::apply_filter(&local_sockets()?).map_err(std::io::Error::other);
        for family in [libc::AF_VSOCK, libc::AF_INET, libc::AF_NETLINK] {
            assert_eq!(ends(confine, libc::SYS_socket, [family.into(), 1, 0]), Ok(libc::EPERM), "{family}");
        }
        assert_eq!(ends(confine, libc::SYS_socket, [libc::AF_UNIX.into(), 1, 0]), Ok(0));
        assert_eq!(ends(confine, libc::SYS_bpf, [-1, 0, 0]), Ok(libc::EPERM));
    }

    #[test]
    fn a_vsock_server_starts_nothing_and_opens_nothing() {
        for number in [libc::SYS_execve, libc::SYS_openat2, libc::SYS_clone, libc::SYS_mount, libc::SYS_setuid] {
            assert_eq!(ends(leave_vsock_calls, number, [0, 0, 0]), Err(libc::SIGSYS), "{number}");
        }
        assert_eq!(ends(leave_vsock_calls, libc::SYS_openat, [-1, 0, 0]), Ok(libc::EACCES));
        assert_eq!(ends(leave_vsock_calls, libc::SYS_socket, [libc::AF_INET.into(), 1, 0]), Err(libc::SIGSYS));
        assert_eq!(ends(leave_vsock_calls, libc::SYS_socket, [libc::AF_UNIX.into(), 1, 0]), Ok(0));
        assert_eq!(ends(leave_vsock_calls, libc::SYS_ioctl, [-1, 0x5413, 0]), Err(libc::SIGSYS));
        assert_eq!(ends(leave_vsock_calls, libc::SYS_close, [-1, 0, 0]), Ok(libc::EBADF));
    }
}
