//! Requests as Kata 4.1's host has sent them (`golden/METHOD.hex`, from a recorded run), and what a policy sees of each
//! (`golden/METHOD.json`). Where a form changes on purpose, `UPDATE_GOLDEN=1` writes the files anew.

use std::path::Path;

use coracle_protocol::protobuf::reflect::MessageDescriptor;
use coracle_protocol::{agent, policy_json};
use serde_json::Value;

/// The message that a method takes.
fn request_of(method: &str) -> MessageDescriptor {
    let file = agent::file_descriptor();
    let service = file.proto().service.iter().find(|service| service.name() == "AgentService").unwrap().clone();
    let method = service.method.iter().find(|found| found.name() == method).unwrap_or_else(|| panic!("{method}"));
    let name = method.input_type().rsplit('.').next().unwrap().to_owned();
    file.messages().find(|message| message.name() == name).unwrap_or_else(|| panic!("{name}"))
}

#[test]
fn policies_see_what_they_see_of_katas_requests() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).unwrap().flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "hex") {
            continue;
        }
        let method = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let bytes = hex::decode(std::fs::read_to_string(&path).unwrap().trim()).unwrap();
        let request = request_of(&method).parse_from_bytes(&bytes).unwrap();
        let again = request_of(&method).parse_from_bytes(&request.write_to_bytes_dyn().unwrap()).unwrap();
        assert!(
            request.reflect_eq_dyn(&*again, &coracle_protocol::protobuf::reflect::ReflectEqMode::default()),
            "{method}"
        );
        let unknown = request.special_fields_dyn().unknown_fields().iter().count();
        assert_eq!(unknown, 0, "{method} has fields that we do not know");
        let form = policy_json(&*request);
        let golden = path.with_extension("json");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&golden, serde_json::to_string_pretty(&form).unwrap() + "\n").unwrap();
        }
        let expected: Value = serde_json::from_str(&std::fs::read_to_string(&golden).unwrap()).unwrap();
        assert_eq!(form, expected, "{method}");
        count += 1;
    }
    assert!(count >= 14, "{count}");
}
