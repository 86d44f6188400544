//! Fields that this version of the program does not know, kept while a record is read, changed and written.
//!
//! When hosts of two versions share a store, the older must not erase what the newer wrote. So at reading, the record
//! is compared with what this version makes of it; whatever is only in the record is remembered as a tree, and at
//! writing put back where the objects around it still exist. Elements of arrays are matched by their `id`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// What is unknown at one place of a record.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Unknown {
    /// The whole value.
    Value(Value),
    /// Something in the fields of an object.
    Fields(BTreeMap<String, Unknown>),
    /// Something in elements of an array, by their `id`.
    Elements(BTreeMap<String, Unknown>),
}

impl Unknown {
    /// What `raw` has and `known`, which is `raw` as this version would write it, has not.
    pub fn of(raw: &Value, known: &Value) -> Option<Unknown> {
        match (raw, known) {
            (Value::Object(raw), Value::Object(known)) => {
                let fields: BTreeMap<String, Unknown> = raw
                    .iter()
                    .filter_map(|(name, value)| {
                        let unknown = match known.get(name) {
                            Some(known) => Unknown::of(value, known),
                            // This version leaves empty things out; that is no loss.
                            None => (!value.is_null()).then(|| Unknown::Value(value.clone())),
                        };
                        unknown.map(|unknown| (name.clone(), unknown))
                    })
                    .collect();
                (!fields.is_empty()).then_some(Unknown::Fields(fields))
            }
            (Value::Array(raw), Value::Array(known)) => {
                let elements: BTreeMap<String, Unknown> = raw
                    .iter()
                    .filter_map(|element| {
                        let id = id_of(element)?;
                        let known = known.iter().find(|other| id_of(other) == Some(id))?;
                        Some((id.to_owned(), Unknown::of(element, known)?))
                    })
                    .collect();
                (!elements.is_empty()).then_some(Unknown::Elements(elements))
            }
            _ => None,
        }
    }

    /// Puts it back into what this version writes.
    pub fn restore(&self, value: &mut Value) {
        match (self, value) {
            (Unknown::Fields(unknown), Value::Object(fields)) => {
                for (name, unknown) in unknown {
                    restore_field(fields, name, unknown);
                }
            }
            (Unknown::Elements(unknown), Value::Array(elements)) => {
                for element in elements {
                    if let Some(unknown) = id_of(element).and_then(|id| unknown.get(id)) {
                        unknown.restore(element);
                    }
                }
            }
            _ => {}
        }
    }
}

fn restore_field(fields: &mut Map<String, Value>, name: &str, unknown: &Unknown) {
    match (fields.get_mut(name), unknown) {
        // This version has begun to write the field: it knows better.
        (Some(_), Unknown::Value(_)) => {}
        (Some(field), unknown) => unknown.restore(field),
        (None, Unknown::Value(value)) => {
            fields.insert(name.to_owned(), value.clone());
        }
        // The object around it was removed, and it with it.
        (None, _) => {}
    }
}

fn id_of(element: &Value) -> Option<&str> {
    element.get("id")?.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn through(raw: Value, known: Value, mut changed: Value) -> Value {
        if let Some(unknown) = Unknown::of(&raw, &known) {
            unknown.restore(&mut changed);
        }
        changed
    }

    #[test]
    fn nothing_unknown_costs_nothing() {
        assert_eq!(Unknown::of(&json!({"a": 1, "b": [1]}), &json!({"a": 1, "b": [1]})), None);
        assert_eq!(Unknown::of(&json!({"a": null}), &json!({})), None);
    }

    #[test]
    fn nested_fields_and_elements_survive() {
        let raw = json!({"a": 1, "new": 2, "in": {"x": 1, "new": 3},
            "list": [{"id": "p", "n": 1, "new": 4}, {"id": "q", "n": 2, "new": 5}]});
        let known = json!({"a": 1, "in": {"x": 1}, "list": [{"id": "p", "n": 1}, {"id": "q", "n": 2}]});
        let changed = json!({"a": 7, "in": {"x": 8}, "list": [{"id": "r", "n": 0}, {"id": "q", "n": 9}]});
        assert_eq!(
            through(raw, known, changed),
            json!({"a": 7, "new": 2, "in": {"x": 8, "new": 3}, "list": [{"id": "r", "n": 0}, {"id": "q", "n": 9, "new": 5}]})
        );
    }

    #[test]
    fn what_was_removed_stays_removed() {
        let raw = json!({"map": {"a": 1, "b": 2}, "gone": {"x": 1, "new": 2}});
        let known = json!({"map": {"a": 1, "b": 2}, "gone": {"x": 1}});
        assert_eq!(through(raw, known, json!({"map": {"a": 1}})), json!({"map": {"a": 1}}));
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![any::<bool>().prop_map(Value::from), any::<i32>().prop_map(Value::from)];
        leaf.prop_recursive(3, 24, 4, |inner| {
            proptest::collection::btree_map("[a-d]", inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect()))
        })
    }

    /// Removes some fields, as a version that does not know them would.
    fn forget(value: &Value, choice: u32, depth: u32) -> Value {
        match value {
            Value::Object(fields) => fields
                .iter()
                .enumerate()
                .filter(|(place, _)| (choice >> ((*place as u32 + depth * 3) % 31)) & 1 == 0)
                .map(|(_, (name, field))| (name.clone(), forget(field, choice, depth + 1)))
                .collect::<Map<_, _>>()
                .into(),
            other => other.clone(),
        }
    }

    proptest! {
        /// Reading and writing without a change gives the record back, whatever a version does not know.
        #[test]
        fn unchanged_records_come_back_whole(raw in json_value(), choice in any::<u32>()) {
            let known = forget(&raw, choice, 0);
            prop_assert_eq!(through(raw.clone(), known.clone(), known), raw);
        }
    }
}
