//! Migrations of records. All of them stand here, and nowhere else is a stored record's old form known.
//!
//! A record says its version in `"v"`. Reading one of an older version runs the steps below one after the other; the
//! record is written in the new form when it is next changed. To change the form of a table: raise
//! [`crate::Record::VERSION`], add the step from the version before, add a test with a record as the old version
//! wrote it. Adding an optional field needs neither: old records lack it, and old programs keep it. A renamed field is
//! a step, never a `serde(alias)`: the old name would be kept as unknown and then clash with the new one.

use serde_json::Value;

/// Brings a record of `table` from `from_version` to the next version.
type Step = fn(Value) -> Value;

/// Table, version that the step starts from, step.
const STEPS: &[(&str, u32, Step)] = &[
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
}
