//! The bridge between OCI's JSON and the wire's messages.
//!
//! `proto/oci.proto` gives each field its OCI name as `json_name`, so a bundle's `config.json` becomes a message, and a
//! message an OCI structure, by one generic walk each: no field is copied by hand.

use protobuf::MessageDyn;
use protobuf::reflect::{FieldDescriptor, ReflectFieldRef, ReflectValueRef, RuntimeFieldType, RuntimeType};
use serde_json::{Map, Value};

/// Why JSON is not the message that was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct JsonError(String);

/// Reads the message `M` from JSON; unknown fields are passed over, as OCI asks of its readers.
///
/// # Errors
/// [`JsonError`] where the text is no JSON or a field has another type.
pub fn from_json<M: protobuf::MessageFull>(json: &str) -> Result<M, JsonError> {
    // The other reader takes more than JSON has (escapes with octal numbers), and overflows at one of them.
    serde_json::from_str::<serde::de::IgnoredAny>(json).map_err(|error| JsonError(error.to_string()))?;
    let options = protobuf_json_mapping::ParseOptions { ignore_unknown_fields: true, ..Default::default() };
    protobuf_json_mapping::parse_from_str_with_options(json, &options).map_err(|error| JsonError(error.to_string()))
}

/// The message as JSON with its `json_name`s. Numbers stay numbers at 64 bits too, zero and `false` are written, what
/// is empty (text, list, map, absent message) is left out.
#[must_use]
pub fn to_json(message: &dyn MessageDyn) -> Value {
    let mut object = Map::new();
    for field in message.descriptor_dyn().fields() {
        let value = match field.get_reflect(message) {
            ReflectFieldRef::Optional(optional) => match optional.value() {
                Some(value) => scalar(value),
                None if has_default(&field) => scalar(field.get_singular_field_or_default(message)),
                None => Value::Null,
            },
            ReflectFieldRef::Repeated(list) => {
                if list.is_empty() {
                    Value::Null
                } else {
                    Value::Array(list.into_iter().map(item).collect())
                }
            }
            ReflectFieldRef::Map(map) => {
                let entries: Map<String, Value> =
                    map.into_iter().map(|(key, value)| (key.to_string(), item(value))).collect();
                if entries.is_empty() { Value::Null } else { Value::Object(entries) }
            }
        };
        if !value.is_null() {
            object.insert(field.json_name().to_owned(), value);
        }
    }
    Value::Object(object)
}

/// Whether a single field that was not sent stands for a value: not a message, one of several, or one that may be absent.
pub(crate) fn has_default(field: &FieldDescriptor) -> bool {
    let message = matches!(field.runtime_field_type(), RuntimeFieldType::Singular(RuntimeType::Message(_)));
    !message && field.containing_oneof().is_none() && !field.proto().proto3_optional()
}

/// A single field: empty text counts as absent.
fn scalar(value: ReflectValueRef<'_>) -> Value {
    match value {
        ReflectValueRef::String("") => Value::Null,
        other => item(other),
    }
}

/// An element of a list or map: empty text is kept.
fn item(value: ReflectValueRef<'_>) -> Value {
    as_value(value, to_json)
}

/// A value as JSON; `form` is that of a message.
pub(crate) fn as_value(value: ReflectValueRef<'_>, form: fn(&dyn MessageDyn) -> Value) -> Value {
    match value {
        ReflectValueRef::U32(number) => number.into(),
        ReflectValueRef::U64(number) => number.into(),
        ReflectValueRef::I32(number) => number.into(),
        ReflectValueRef::I64(number) => number.into(),
        ReflectValueRef::F32(number) => number.into(),
        ReflectValueRef::F64(number) => number.into(),
        ReflectValueRef::Bool(truth) => truth.into(),
        ReflectValueRef::String(text) => text.into(),
        ReflectValueRef::Bytes(bytes) => Value::Array(bytes.iter().map(|byte| (*byte).into()).collect()),
        ReflectValueRef::Enum(_, number) => number.into(),
        ReflectValueRef::Message(message) => form(&*message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci;

    const CONFIG: &str = r#"{"ociVersion":"1.0.2","unknown":{"a":[1]},"hostname":"h",
        "process":{"terminal":true,"user":{"uid":1000,"gid":0,"additionalGids":[5]},"args":["sh",""],"cwd":"/",
        "env":["A="],"rlimits":[{"type":"RLIMIT_CORE","hard":0,"soft":0}],"oomScoreAdj":-5,
        "capabilities":{"bounding":["CAP_KILL"]},"noNewPrivileges":true},
        "root":{"path":"rootfs"},"mounts":[{"destination":"/proc","type":"proc","source":"proc"}],
        "linux":{"timeOffsets":{"monotonic":{"secs":5}},"personality":{"domain":"LINUX32"},
        "resources":{"devices":[{"allow":true,"type":"c","major":5,"minor":0},{"allow":false}],"memory":{"limit":1099511627776},"cpu":{"shares":2,"quota":-1},"pids":{"limit":9},
        "unified":{"memory.high":"1"}},"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],
        "action":"SCMP_ACT_ALLOW","errnoRet":1}]},"sysctl":{"a.b":"c"}}}"#;

    #[test]
    fn what_is_no_json_is_refused_whatever_the_library_takes() {
        for text in [r#"{"a":"\778"}"#, r#"{"\x67":1}"#, "{'a':1}", "{} {}", ""] {
            assert!(from_json::<oci::Spec>(text).is_err(), "{text}");
        }
        assert!(from_json::<oci::Spec>(r#"{"a":"\u0041","hostname":"h"}"#).is_ok());
    }

    #[test]
    fn oci_json_becomes_a_message_and_comes_back() {
        let spec: oci::Spec = from_json(CONFIG).unwrap();
        assert_eq!(spec.Process.User.UID, 1000);
        assert_eq!(spec.Linux.Resources.Memory.Limit, 1 << 40);
        assert_eq!(spec.Linux.Resources.CPU.Quota, -1);
        let json = to_json(&spec);
        assert_eq!(json["process"]["rlimits"][0]["hard"], 0, "zero is written");
        assert_eq!(json["process"]["args"][1], "", "an empty element is kept");
        assert_eq!(json["linux"]["resources"]["memory"]["limit"], 1_i64 << 40, "64 bits stay a number");
        assert_eq!(json["linux"]["seccomp"]["syscalls"][0]["errnoRet"], 1);
        assert_eq!(json["linux"]["resources"]["devices"][0]["minor"], 0, "an explicit zero is kept");
        assert!(json["linux"]["resources"]["devices"][1].get("minor").is_none(), "an absent number is absent");
        assert!(json["process"]["user"].get("umask").is_none());
        assert_eq!(json["linux"]["resources"]["unified"]["memory.high"], "1");
        assert_eq!(json["linux"]["timeOffsets"]["monotonic"]["secs"], 5);
        assert_eq!(json["linux"]["personality"]["domain"], "LINUX32");
        assert!(json["process"].get("apparmorProfile").is_none(), "empty text is absent");
        assert!(json.get("solaris").is_none(), "an absent message is absent");
    }

    #[test]
    fn wrong_types_are_refused() {
        assert!(from_json::<oci::Spec>(r#"{"process":{"args":"x"}}"#).is_err());
        assert!(from_json::<oci::Spec>(r#"{"process":{"user":{"uid":-1}}}"#).is_err());
        assert!(from_json::<oci::Spec>("{").is_err());
    }
}
