//! The system calls of each kind of thread (seccomp). Any other one ends the monitor.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::requests::requests;
use crate::Error;

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Control and the devices that never wait.
    Main,
    /// A disk's loop.
    Disk,
    /// A processor.
    Processor,
    /// What makes processors that come later. What it makes is confined further.
    Nursery,
}

/// What any thread of this program may do: memory of its own, locks, its end.
const ALL: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Beside [`ALL`].
fn own(kind: Kind) -> &'static [libc::c_long] {
    match kind {
        Kind::Main => &[
            libc::SYS_accept4,
            libc::SYS_connect,
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_wait,
            // Devices that come later are made here, and disks get another size.
            libc::SYS_eventfd2,
            libc::SYS_fallocate,
            libc::SYS_fstat,
            libc::SYS_ftruncate,
            libc::SYS_getrandom,
            libc::SYS_getsockopt,
            libc::SYS_lseek,
            libc::SYS_mincore,
            libc::SYS_newfstatat,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_poll,
            libc::SYS_ppoll,
            libc::SYS_readv,
            libc::SYS_recvfrom,
            libc::SYS_recvmsg,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_shutdown,
            libc::SYS_statx,
            libc::SYS_timerfd_create,
            libc::SYS_timerfd_settime,
            libc::SYS_writev,
        ],
        Kind::Disk => &[
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_wait,
            libc::SYS_fallocate,
            libc::SYS_fdatasync,
            libc::SYS_fstat,
            libc::SYS_lseek,
            libc::SYS_pread64,
            libc::SYS_preadv,
            libc::SYS_preadv2,
            libc::SYS_pwrite64,
            libc::SYS_pwritev,
            libc::SYS_pwritev2,
            libc::SYS_timerfd_settime,
        ],
        // Processors have no more than it has.
        Kind::Nursery => &[
            libc::SYS_clone3,
            libc::SYS_poll,
            libc::SYS_ppoll,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_recvfrom,
            libc::SYS_recvmsg,
            libc::SYS_rseq,
            libc::SYS_sched_getaffinity,
            libc::SYS_seccomp,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_set_robust_list,
        ],
        // A driver that sets a device up, or resets it: the file server is spoken to by messages. A device of the host's is a file.
        Kind::Processor => &[
            libc::SYS_poll,
            libc::SYS_ppoll,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_recvfrom,
            libc::SYS_recvmsg,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
        ],
    }
}

/// Leaves the calling thread the system calls of its kind.
pub(crate) fn confine(kind: Kind) -> Result<(), Error> {
    let failed = |error: seccompiler::Error| Error::Invalid(format!("the jail's list of system calls: {error}"));
    if kind == Kind::Nursery {
        seccompiler::apply_filter(&old_clone_only()?).map_err(failed)?;
    }
    seccompiler::apply_filter(&program(kind)?).map_err(failed)
}

fn failed(error: seccompiler::BackendError) -> Error {
    Error::Invalid(format!("the jail's list of system calls: {error}"))
}

fn target() -> Result<TargetArch, Error> {
    TargetArch::try_from(std::env::consts::ARCH).map_err(failed)
}

/// Has the C library make threads by clone(2), whose flags a filter sees; those of clone3(2) it does not see.
fn old_clone_only() -> Result<BpfProgram, Error> {
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let rules = [(libc::SYS_clone3, Vec::new())].into();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, target()?);
    filter.and_then(BpfProgram::try_from).map_err(failed)
}

/// An option of sockets themselves.
fn socket_option(option: i32) -> Result<SeccompRule, seccompiler::BackendError> {
    let is = |argument, value: i32| {
        let value = u64::from(value.unsigned_abs());
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    SeccompRule::new(vec![is(1, libc::SOL_SOCKET)?, is(2, option)?])
}

fn program(kind: Kind) -> Result<BpfProgram, Error> {
    let is = |argument: u8, value: u32| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(value));
        SeccompRule::new(vec![condition?])
    };
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        ALL.iter().chain(own(kind)).map(|number| (*number, Vec::new())).collect();
    let requests: Result<Vec<_>, _> = requests(kind).into_iter().map(|request| is(1, request)).collect();
    // Its own abort; and the main thread's kick that makes a processor leave the guest.
    let mut signals = vec![libc::SIGABRT];
    signals.extend((kind == Kind::Main).then(crate::vcpu::kick_signal));
    let signals: Result<Vec<_>, _> = signals.iter().map(|signal| is(2, signal.unsigned_abs())).collect();
    rules.insert(libc::SYS_tgkill, signals.map_err(failed)?);
    let commands = [libc::F_GETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];
    let commands: Result<Vec<_>, _> = commands.iter().map(|command| is(1, command.unsigned_abs())).collect();
    rules.insert(libc::SYS_fcntl, commands.map_err(failed)?);
    rules.insert(libc::SYS_ioctl, requests.map_err(failed)?);
    if kind == Kind::Main {
        // To the host's programs, which listen in the jail's root.
        let unix = u32::try_from(libc::AF_UNIX).unwrap_or(u32::MAX);
        rules.insert(libc::SYS_socket, vec![is(0, unix).map_err(failed)?]);
        // How long a file server may take that comes later.
        let times: Result<Vec<_>, _> = [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO].into_iter().map(socket_option).collect();
        rules.insert(libc::SYS_setsockopt, times.map_err(failed)?);
    }
    if kind == Kind::Nursery {
        // Threads and nothing else.
        let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
        let is_thread = SeccompCmpOp::MaskedEq(thread);
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, is_thread, thread).map_err(failed)?;
        rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![condition]).map_err(failed)?]);
        let options = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS];
        let options: Result<Vec<_>, _> = options.iter().map(|option| is(0, option.unsigned_abs())).collect();
        rules.insert(libc::SYS_prctl, options.map_err(failed)?);
    }
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, target()?);
    filter.and_then(BpfProgram::try_from).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` in a child that is confined as `kind`, and gives how it ended: `None` by itself, else the signal.
    fn confined(kind: Kind, work: fn()) -> Option<i32> {
        // SAFETY: the child makes system calls only, and ends without going back.
        #[expect(unsafe_code, reason = "fork")]
        let child = unsafe { libc::fork() };
        if child == 0 {
            rustix::thread::set_no_new_privs(true).unwrap();
            confine(kind).unwrap();
            work();
            // SAFETY: it ends the child at once.
            #[expect(unsafe_code, reason = "_exit")]
            unsafe {
                libc::_exit(0)
            };
        }
        let mut status = 0;
        // SAFETY: the pointer is to a live variable; the child is ours.
        #[expect(unsafe_code, reason = "waitpid")]
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(waited, child);
        libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
    }

    fn call(number: libc::c_long, arguments: [libc::c_long; 3]) {
        let [one, two, three] = arguments;
        // SAFETY: the calls of these tests take no pointers but null.
        #[expect(unsafe_code, reason = "the test makes a system call by its number")]
        unsafe {
            libc::syscall(number, one, two, three);
        }
    }

    #[test]
    fn what_is_not_on_the_list_ends_the_monitor() {
        for kind in [Kind::Main, Kind::Disk, Kind::Processor] {
            assert_eq!(confined(kind, || call(libc::SYS_getpid, [0; 3])), None, "{kind:?}");
            assert_eq!(confined(kind, || call(libc::SYS_execve, [0; 3])), Some(libc::SIGSYS), "{kind:?}");
            assert_eq!(confined(kind, || call(libc::SYS_openat, [0; 3])), Some(libc::SIGSYS), "{kind:?}");
            assert_eq!(confined(kind, || call(libc::SYS_ioctl, [0, 0x5413, 0])), Some(libc::SIGSYS), "{kind:?}");
            assert_eq!(confined(kind, || call(libc::SYS_clone3, [0; 3])), Some(libc::SIGSYS), "{kind:?}");
        }
        // What makes threads makes no processes.
        assert_eq!(confined(Kind::Nursery, || call(libc::SYS_clone3, [0; 3])), None);
        assert_eq!(confined(Kind::Nursery, || call(libc::SYS_clone, [0; 3])), Some(libc::SIGSYS));
        assert_eq!(confined(Kind::Nursery, || call(libc::SYS_openat, [0; 3])), Some(libc::SIGSYS));
        let thread = || {
            drop(
                std::thread::Builder::new()
                    .name("one".into())
                    .spawn(|| confine(Kind::Processor))
                    .map(std::thread::JoinHandle::join),
            )
        };
        assert_eq!(confined(Kind::Nursery, thread), None);
        assert_eq!(confined(Kind::Processor, thread), Some(libc::SIGSYS));
        assert_eq!(confined(Kind::Main, || call(libc::SYS_socket, [1, 1, 0])), None);
        assert_eq!(confined(Kind::Main, || call(libc::SYS_socket, [2, 1, 0])), Some(libc::SIGSYS));
        assert_eq!(confined(Kind::Processor, || call(libc::SYS_socket, [1, 1, 0])), Some(libc::SIGSYS));
        assert_eq!(confined(Kind::Processor, || call(libc::SYS_ioctl, [-1, 0xae80, 0])), None);
        // The kernel's net device: made by the main thread, set up by processors, stopped by both.
        assert_eq!(confined(Kind::Main, || call(libc::SYS_ioctl, [-1, 0xaf01, 0])), None);
        assert_eq!(confined(Kind::Processor, || call(libc::SYS_ioctl, [-1, 0xaf01, 0])), Some(libc::SIGSYS));
        for kind in [Kind::Main, Kind::Processor] {
            assert_eq!(confined(kind, || call(libc::SYS_ioctl, [-1, 0x4008_af30, 0])), None, "{kind:?}");
        }
        assert_eq!(confined(Kind::Main, || call(libc::SYS_ioctl, [-1, 0x4008_af03, 0])), Some(libc::SIGSYS));
    }
}
