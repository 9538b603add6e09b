//! Requests of a host that means harm, as the agent decodes them and lets them pass: each of the protocol's methods.

use coracle_protocol::agent::file_descriptor;
use coracle_protocol::names::is_name;
use coracle_protocol::protobuf::reflect::{ReflectFieldRef, ReflectValueRef};

use crate::input::Input;

/// Runs one input: a method, and the bytes of its request.
///
/// # Panics
/// Where a request passes whose names could be anything but names, or what was decoded is another thing when it is encoded again.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    let service = file_descriptor().proto().service.iter().find(|service| service.name() == "AgentService");
    let methods = &service.expect("the service").method;
    let method = &methods[usize::from(input.byte()) % methods.len()];
    let name = method.input_type().rsplit('.').next().unwrap_or_default();
    // Some requests are of Kata's other files.
    let Some(message) = file_descriptor().message_by_package_relative_name(name) else { return };
    let Ok(request) = message.parse_from_bytes(input.rest()) else { return };
    let bytes = request.write_to_bytes_dyn().expect("what was decoded is encoded");
    let again = message.parse_from_bytes(&bytes).expect("what was encoded is decoded");
    // Numbers that are none, and unknown fields, may differ by their order alone.
    assert_eq!(again.write_to_bytes_dyn().expect("again").len(), bytes.len(), "{name}");
    if coracle_agent::admit(method.name(), &*request).is_err() {
        return;
    }
    for field in message.fields().filter(|field| matches!(field.name(), "container_id" | "exec_id")) {
        if let ReflectFieldRef::Optional(value) = field.get_reflect(&*request)
            && let Some(ReflectValueRef::String(name)) = value.value()
        {
            assert!(is_name(name) || name.is_empty() && field.name() == "exec_id", "{name:?} has passed");
            assert!(!name.contains('/') && name != "." && name != "..", "{name:?}");
        }
    }
}
