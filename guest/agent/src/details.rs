//! What the guest says of itself, and what the host may set in it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use coracle_protocol::agent::{
    AgentDetails, GuestDetailsRequest, GuestDetailsResponse, ReseedRandomDevRequest, SetGuestDateTimeRequest,
};
use coracle_protocol::protobuf::MessageField;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::state::Agent;
use crate::{Error, Result, SharedSource, renewal, storage};

/// The most bytes of randomness that one request may add.
const SEED_BYTES_MAX: usize = 4096;

/// Version and abilities.
pub(crate) async fn details(_: &Arc<Agent>, request: GuestDetailsRequest) -> Result<GuestDetailsResponse> {
    let block = if request.mem_block_size { memory_block_bytes() } else { 0 };
    let probe = request.mem_hotplug_probe && std::path::Path::new("/sys/devices/system/memory/probe").exists();
    Ok(GuestDetailsResponse {
        mem_block_size_bytes: block,
        support_mem_hotplug_probe: probe,
        agent_details: MessageField::some(AgentDetails {
            version: coracle_protocol::VERSION.into(),
            init_daemon: false,
            storage_handlers: storage::DRIVERS.iter().map(|&name| name.to_owned()).collect(),
            supports_seccomp: true,
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn memory_block_bytes() -> u64 {
    let text = std::fs::read_to_string("/sys/devices/system/memory/block_size_bytes").unwrap_or_default();
    u64::from_str_radix(text.trim(), 16).unwrap_or(0)
}

/// Mixes the host's bytes into the kernel's randomness, without crediting them. What it hands out from now on comes of them, too.
pub(crate) async fn reseed(_: &Arc<Agent>, request: ReseedRandomDevRequest) -> Result<Empty> {
    if request.data.len() > SEED_BYTES_MAX {
        return Err(Error::Invalid(format!("more than {SEED_BYTES_MAX} bytes of randomness")));
    }
    renewal::mix(&request.data)?;
    Ok(Empty::new())
}

/// What a clock may differ by and be put right without a jump.
const SLEW_MAX: Duration = Duration::from_millis(50);

/// Sets the guest's clock. A small difference is made up for little by little, so that time never goes back for it.
pub(crate) async fn set_clock(agent: &Arc<Agent>, request: SetGuestDateTimeRequest) -> Result<Empty> {
    if agent.config.shared == SharedSource::InPlace {
        return Err(Error::Unsupported("a clock beside the host's, which is this agent's own,".into()));
    }
    let nanoseconds = request
        .Usec
        .checked_mul(1000)
        .filter(|nanoseconds| (0..1_000_000_000).contains(nanoseconds))
        .ok_or_else(|| Error::Invalid("microseconds out of range".into()))?;
    let wanted = Duration::new(
        u64::try_from(request.Sec).map_err(|_| Error::Invalid("seconds out of range".into()))?,
        u32::try_from(nanoseconds).unwrap_or(0),
    );
    let own = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (behind, ahead) = (wanted.saturating_sub(own), own.saturating_sub(wanted));
    if behind <= SLEW_MAX && ahead <= SLEW_MAX {
        return slew(behind.subsec_micros(), ahead.subsec_micros());
    }
    let time = nix::sys::time::TimeSpec::new(request.Sec, nanoseconds);
    nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time).map_err(Error::system("set the clock"))?;
    Ok(Empty::new())
}

fn slew(behind: u32, ahead: u32) -> Result<Empty> {
    let micros = i64::from(behind) - i64::from(ahead);
    let delta = libc::timeval { tv_sec: 0, tv_usec: micros };
    // SAFETY: the first pointer is to a live structure that is only read; the second may be null (adjtime(3)).
    #[expect(unsafe_code, reason = "libc has the call and no safe wrapper")]
    let result = unsafe { libc::adjtime(&raw const delta, std::ptr::null_mut()) };
    if result < 0 {
        return Err(Error::system("adjust the clock")(std::io::Error::last_os_error()));
    }
    Ok(Empty::new())
}
