//! What every request passes before its handler sees it.
//!
//! Today the gate holds the bounds that keep the engine safe, whatever the host sends. A policy engine takes its place
//! beside these checks; nothing else has to change for it.

use coracle_protocol::names::is_name;
use coracle_protocol::protobuf::MessageDyn;
use coracle_protocol::protobuf::reflect::{ReflectFieldRef, ReflectValueRef};

use crate::{Error, Result};

/// Lets `request` for `method` pass, or says why not.
///
/// # Errors
/// [`Error::Invalid`] where a name could be anything but a name: it becomes a part of paths.
pub fn admit(method: &str, request: &dyn MessageDyn) -> Result<()> {
    for field in request.descriptor_dyn().fields() {
        if !matches!(field.name(), "container_id" | "exec_id") {
            continue;
        }
        let ReflectFieldRef::Optional(value) = field.get_reflect(request) else { continue };
        let name = match value.value() {
            Some(ReflectValueRef::String(name)) => name,
            _ => "",
        };
        let may_be_empty = field.name() == "exec_id";
        if !(is_name(name) || may_be_empty && name.is_empty()) {
            return Err(Error::Invalid(format!("{method}: {} is not a valid name", field.name())));
        }
    }
    Ok(())
}

/// Lets the host reach a port of the guest's loopback, or says why not.
///
/// # Errors
/// [`Error::Invalid`] for port 0, which is none.
pub(crate) fn admit_port(method: &'static str, port: u16) -> Result<()> {
    if port == 0 { Err(Error::Invalid(format!("{method}: there is no port 0"))) } else { Ok(()) }
}

/// Lets the host have a shell in a guest whose command line allows that.
///
/// # Errors
/// None yet: a policy may have one.
pub(crate) fn admit_debug_console() -> Result<()> {
    Ok(())
}

/// Lets the host fetch spans of its own requests: they say no more than it knows from their answers, and how long they took.
///
/// # Errors
/// None yet: a policy may have one.
pub(crate) fn admit_spans() -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use coracle_protocol::agent::{ExecProcessRequest, StartContainerRequest};

    use super::*;

    fn start(container_id: &str) -> Result<()> {
        admit("StartContainer", &StartContainerRequest { container_id: container_id.into(), ..Default::default() })
    }

    #[test]
    fn names_pass_and_paths_do_not() {
        for good in ["a", "web-1", "0123456789abcdef", "a.b_c"] {
            assert!(start(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "/a", "a\0", "a b", "-x", "é", &"x".repeat(129)] {
            assert!(start(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_empty_exec_id_is_the_containers_own_process() {
        let request = |exec_id: &str| ExecProcessRequest {
            container_id: "c".into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        assert!(admit("ExecProcess", &request("")).is_ok());
        assert!(admit("ExecProcess", &request("../e")).is_err());
    }
}
