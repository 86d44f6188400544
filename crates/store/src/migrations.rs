//! Migrations of records. All of them stand here, and nowhere else is a stored record's old form known.
//!
//! A record says its version in `"v"`. Reading one of an older version runs the steps below one after the other; the
//! record is written in the new form when it is next changed. To change the form of a table: raise
//! [`crate::Record::VERSION`], add the step from the version before, add a test with a record as the old version
//! wrote it. Adding an optional field needs neither: old records lack it, and old programs keep it. A renamed field is
//! a step, never a `serde(alias)`: the old name would be kept as unknown and then clash with the new one.

use serde_json::{Value, json};

/// Brings a record of `table` from `from_version` to the next version.
type Step = fn(Value) -> Value;

/// Table, version that the step starts from, step.
const STEPS: &[(&str, u32, Step)] = &[
    ("projects", 1, project_says_its_volumes),
    #[cfg(test)]
    ("test-gadgets", 1, tests::gadget_label_becomes_title),
    #[cfg(test)]
    ("test-gadgets", 2, tests::gadget_gets_a_count),
];

/// Brings `record` from `from_version` to the version after it. Without a step for it, it stays as it is.
pub(crate) fn migrate(table: &str, from_version: u32, record: Value) -> Value {
    match STEPS.iter().find(|(name, from, _)| *name == table && *from == from_version) {
        Some((_, _, step)) => step(record),
        None => record,
    }
}

/// Every project had volumes of its own, also one whose configuration did not say so; now what is not said is shared.
fn project_says_its_volumes(mut record: Value) -> Value {
    if let Some(fields) = record.as_object_mut()
        && let Some(config) = fields.entry("config").or_insert_with(|| json!({})).as_object_mut()
    {
        config.entry("features.storage.volumes").or_insert_with(|| "true".into());
    }
    record
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::Value;

    pub(super) fn gadget_label_becomes_title(mut record: Value) -> Value {
        if let Some(label) = record.as_object_mut().and_then(|fields| fields.remove("label")) {
            record["title"] = label;
        }
        record
    }

    pub(super) fn gadget_gets_a_count(mut record: Value) -> Value {
        record["count"] = 1.into();
        record
    }

    #[test]
    fn projects_of_before_keep_the_volumes_that_they_have() {
        use crate::Table;
        use karst_model::project::Project;
        let read = |config: Value| {
            let old = serde_json::json!({
                "v": 1, "id": "6f9619ff-8b86-4d01-b42d-00cf4fc964ff", "name": "team", "description": "", "config": config,
                "spec_version": 3
            });
            let kv = crate::KeyValue {
                key: "/karst/v1/projects/6f9619ff-8b86-4d01-b42d-00cf4fc964ff".into(),
                value: serde_json::to_vec(&old).unwrap().into(),
                create_revision: 7,
                mod_revision: 7,
                version: 1,
                lease: None,
            };
            Table::<Project>::new().decode(&kv).unwrap().value.config
        };
        let said = read(serde_json::json!({"user.a": "b"}));
        assert_eq!(said["features.storage.volumes"], "true");
        assert_eq!(said["user.a"], "b");
        assert_eq!(read(serde_json::json!({}))["features.storage.volumes"], "true");
        let own = read(serde_json::json!({"features.storage.volumes": "true"}));
        assert_eq!(own.len(), 1, "as it was written");
    }
}
