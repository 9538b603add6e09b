//! What a policy sees of a request: JSON with the names of the protocol's fields (`OCI.Process.Args`), as policies for Kata's agent
//! are written. Every field is there: a number, text or truth that was not sent has its default, a list or map is empty, a message
//! that was not sent is null, and so is a number that may be absent: that is not the same as 0. Enumerations are numbers, bytes are lists
//! of numbers.

use protobuf::MessageDyn;
use protobuf::reflect::{ReflectFieldRef, ReflectValueRef};
use serde_json::{Map, Value, json};

use crate::agent::CopyFileRequest;
use crate::json::{as_value, has_default};

/// The form of `request` that policies match on.
///
/// A file's contents are not a policy's business: of [`CopyFileRequest`] it sees the path, the type, and where a link leads.
#[must_use]
pub fn policy_json(request: &dyn MessageDyn) -> Value {
    match request.downcast_ref::<CopyFileRequest>() {
        Some(copy) => copy_file(copy),
        None => message(request),
    }
}

fn copy_file(request: &CopyFileRequest) -> Value {
    // The types of stat(2), inode(7); none is a file.
    let (kind, target) = match request.file_mode & 0o170_000 {
        0o040_000 => ("directory", Value::Null),
        0o120_000 => ("symlink", String::from_utf8_lossy(&request.data).into_owned().into()),
        0 | 0o100_000 => ("file", Value::Null),
        _ => ("other", Value::Null),
    };
    json!({ "path": request.path, "type": kind, "link_target": target })
}

fn message(message: &dyn MessageDyn) -> Value {
    let mut object = Map::new();
    for field in message.descriptor_dyn().fields() {
        let value = match field.get_reflect(message) {
            ReflectFieldRef::Optional(optional) => match optional.value() {
                Some(value) => item(value),
                None if has_default(&field) => item(field.get_singular_field_or_default(message)),
                None => Value::Null,
            },
            ReflectFieldRef::Repeated(list) => Value::Array(list.into_iter().map(item).collect()),
            ReflectFieldRef::Map(map) => {
                Value::Object(map.into_iter().map(|(key, value)| (key.to_string(), item(value))).collect())
            }
        };
        object.insert(field.name().to_owned(), value);
    }
    Value::Object(object)
}

fn item(value: ReflectValueRef<'_>) -> Value {
    as_value(value, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{CreateContainerRequest, StartContainerRequest, UpdateInterfaceRequest, WriteStreamRequest};

    #[test]
    fn what_was_not_sent_is_a_default_or_null() {
        assert_eq!(policy_json(&StartContainerRequest::new()), json!({ "container_id": "" }));
        let create = policy_json(&CreateContainerRequest::new());
        assert_eq!(
            (&create["OCI"], &create["storages"], &create["stdout_port"]),
            (&Value::Null, &json!([]), &json!(0))
        );
        let mut sent = CreateContainerRequest::new();
        sent.OCI.mut_or_insert_default().Process.mut_or_insert_default().Args.push("sh".into());
        let json = policy_json(&sent);
        assert_eq!(json["OCI"]["Process"]["Args"], json!(["sh"]));
        assert_eq!(json["OCI"]["Process"]["NoNewPrivileges"], json!(false));
        let mut device = crate::oci::LinuxDeviceCgroup::new();
        device.Minor = Some(0);
        let device = policy_json(&device);
        assert_eq!((&device["Major"], &device["Minor"]), (&Value::Null, &json!(0)), "any number is not the number 0");
        assert_eq!((&json["OCI"]["Linux"], &json["OCI"]["Annotations"]), (&Value::Null, &json!({})));
    }

    #[test]
    fn numbers_stand_for_enumerations_and_bytes() {
        let mut request = UpdateInterfaceRequest::new();
        let mut address = crate::types::IPAddress::new();
        address.family = crate::types::IPFamily::v6.into();
        request.interface.mut_or_insert_default().IPAddresses.push(address);
        assert_eq!(policy_json(&request)["interface"]["IPAddresses"][0]["family"], 1);
        let write = WriteStreamRequest { data: vec![1, 255], ..Default::default() };
        assert_eq!(policy_json(&write)["data"], json!([1, 255]));
    }

    #[test]
    fn of_a_file_only_its_place_is_seen() {
        let request = |mode: u32| CopyFileRequest {
            path: "/p".into(),
            file_mode: mode,
            data: b"secret".to_vec(),
            ..Default::default()
        };
        let form = |mode: u32| policy_json(&request(mode));
        assert_eq!(form(0o100_644), json!({ "path": "/p", "type": "file", "link_target": null }));
        assert_eq!(form(0o040_755), json!({ "path": "/p", "type": "directory", "link_target": null }));
        assert_eq!(form(0o120_777), json!({ "path": "/p", "type": "symlink", "link_target": "secret" }));
        assert_eq!(form(0o010_644)["type"], "other");
    }
}
