//! Paths inside the guest that the host names in its requests. They are Kata's.

/// Where the shared file system is mounted, one folder for each container below it.
pub const SHARED: &str = "/run/kata-containers/shared/containers";

/// The folder below [`SHARED`] of what several containers of a pod have, one folder for each. No container is called so. (Ours: a peer's
/// agent has no need to know it.)
pub const VOLUMES: &str = "@volumes";

/// The tag of the shared file system.
pub const SHARED_TAG: &str = "kataShared";

/// The pod's shared memory file system.
pub const SHM: &str = "/run/kata-containers/sandbox/shm";

/// Where the agent keeps its own state of containers.
pub const STATE: &str = "/run/kata-containers";

/// Files of the host's of which the guest has a copy, one folder for each volume. (Ours: a peer's host names none there.)
pub const COPIES: &str = "/run/kata-containers/copies";

/// The link by which Kubernetes' atomic writer turns a whole volume to what it is next: the host copies it last, and the guest then takes
/// away what was.
pub const DATA: &str = "..data";
