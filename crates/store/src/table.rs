//! Typed tables: records as JSON under `/karst/v1/<table>/<id>`, and index keys that make names unique.

use std::fmt::Display;
use std::marker::PhantomData;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Result, StoreError};
use crate::migrations::migrate;
use crate::store::Store;
use crate::types::*;
use crate::unknown::Unknown;

/// Everything of Karst is under this; the inventory watches it.
pub const ROOT: &str = "/karst/v1/";

/// Keys of one page when a table is listed.
const PAGE: usize = 500;

/// Something that is kept in a table. Its JSON must be an object without a field `v`.
pub trait Record: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Name of the table: `instances`.
    const TABLE: &'static str;
    /// Version of the record's form; see [`mod@crate::migrations`] before raising it.
    const VERSION: u32 = 1;

    /// What it is found by, unique in its table: its UUID, or whatever else identifies it.
    fn record_id(&self) -> String;
}

/// A record as read: the value, the revision to expect when changing it, and what this version does not know.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<T> {
    /// The record.
    pub value: T,
    /// Revision of its last change, for [`crate::TxnBuilder::update`].
    pub mod_revision: Revision,
    /// Version of the form that it was written in, if that is newer than ours.
    newer: Option<u32>,
    unknown: Option<Box<Unknown>>,
}

impl<T> Stored<T> {
    /// The same record with another value; what is unknown stays with it.
    pub fn with(&self, value: T) -> Stored<T> {
        let (mod_revision, newer, unknown) = (self.mod_revision, self.newer, self.unknown.clone());
        Stored { value, mod_revision, newer, unknown }
    }
}

impl<T> std::ops::Deref for Stored<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// A part of a key, made safe: whatever is not of `[A-Za-z0-9._:-]` becomes `%XX`. Different texts stay different.
pub fn key_part(text: &str) -> String {
    let mut part = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b':' | b'-' => part.push(byte as char),
            other => part.push_str(&format!("%{other:02X}")),
        }
    }
    part
}

/// The key that makes `name` unique in `scope` of `table` (`/karst/v1/index/<table>/<scope>/<name>`); its value is the
/// id of the record that has the name.
pub fn index_key(table: &str, scope: impl Display, name: &str) -> String {
    format!("{ROOT}index/{}/{}/{}", key_part(table), key_part(&scope.to_string()), key_part(name))
}

/// Where all names of a scope are.
pub fn index_prefix(table: &str, scope: impl Display) -> String {
    format!("{ROOT}index/{}/{}/", key_part(table), key_part(&scope.to_string()))
}

/// The table of a record type.
#[derive(Debug)]
pub struct Table<T>(PhantomData<fn() -> T>);

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Table<T> {}

impl<T: Record> Default for Table<T> {
    fn default() -> Self {
        Table::new()
    }
}

impl<T: Record> Table<T> {
    /// The table.
    pub const fn new() -> Table<T> {
        Table(PhantomData)
    }

    /// What all of its keys begin with.
    pub fn prefix(&self) -> String {
        format!("{ROOT}{}/", key_part(T::TABLE))
    }

    /// The key of the record `id`.
    pub fn key(&self, id: impl Display) -> String {
        format!("{}{}", self.prefix(), key_part(&id.to_string()))
    }

    /// The key of `record`.
    pub fn key_of(&self, record: &T) -> String {
        self.key(record.record_id())
    }

    /// Is this the key of one of its records? Then the id (as it stands in the key).
    pub fn id_in<'k>(&self, key: &'k str) -> Option<&'k str> {
        key.strip_prefix(ROOT)?.strip_prefix(&key_part(T::TABLE))?.strip_prefix('/')
    }

    /// Reads a record out of what the store has.
    pub fn decode(&self, kv: &KeyValue) -> Result<Stored<T>> {
        let wrong = |reason: String| StoreError::Record { key: kv.key.clone(), reason };
        let mut raw: Value =
            serde_json::from_slice(&kv.value).map_err(|error| wrong(format!("not JSON: {error}")))?;
        let fields = raw.as_object_mut().ok_or_else(|| wrong("not an object".into()))?;
        let version = fields
            .remove("v")
            .and_then(|v| v.as_u64())
            .and_then(|v| u32::try_from(v).ok())
            .ok_or_else(|| wrong("it does not say its version".into()))?;
        for from in version..T::VERSION {
            raw = migrate(T::TABLE, from, raw);
        }
        let value: T = T::deserialize(&raw)
            .map_err(|error| wrong(format!("form {version}, this program knows {}: {error}", T::VERSION)))?;
        let known = serde_json::to_value(&value).map_err(|error| wrong(error.to_string()))?;
        Ok(Stored {
            value,
            mod_revision: kv.mod_revision,
            newer: (version > T::VERSION).then_some(version),
            unknown: Unknown::of(&raw, &known).map(Box::new),
        })
    }

    /// A new record as the store keeps it.
    pub fn encode(&self, record: &T) -> Result<Bytes> {
        self.encode_with(record, None, None)
    }

    /// A record that was read and perhaps changed, with what this version does not know.
    pub fn encode_stored(&self, stored: &Stored<T>) -> Result<Bytes> {
        self.encode_with(&stored.value, stored.newer, stored.unknown.as_deref())
    }

    fn encode_with(&self, record: &T, newer: Option<u32>, unknown: Option<&Unknown>) -> Result<Bytes> {
        let wrong = |reason: String| StoreError::Record { key: self.key_of(record), reason };
        let mut value = serde_json::to_value(record).map_err(|error| wrong(error.to_string()))?;
        if let Some(unknown) = unknown {
            unknown.restore(&mut value);
        }
        let Value::Object(fields) = value else {
            return Err(wrong("not an object".into()));
        };
        if fields.contains_key("v") {
            return Err(wrong("the field `v` is the version's".into()));
        }
        let mut all = serde_json::Map::with_capacity(fields.len() + 1);
        all.insert("v".into(), newer.unwrap_or(T::VERSION).into());
        all.extend(fields);
        serde_json::to_vec(&all).map(Bytes::from).map_err(|error| wrong(error.to_string()))
    }

    /// Reads one record, and the revision of the read.
    pub async fn get(&self, store: &dyn Store, id: impl Display) -> Result<(Option<Stored<T>>, Revision)> {
        let answer = store.get(&self.key(id)).await?;
        Ok((answer.kv.as_ref().map(|kv| self.decode(kv)).transpose()?, answer.revision))
    }

    /// Reads all records as of one revision, which is returned with them. Fails with
    /// [`StoreError::Compacted`] if history went away between pages; then begin again.
    pub async fn list(&self, store: &dyn Store) -> Result<(Vec<Stored<T>>, Revision)> {
        let (kvs, revision) = list_prefix(store, &self.prefix()).await?;
        Ok((kvs.iter().map(|kv| self.decode(kv)).collect::<Result<_>>()?, revision))
    }
}

/// Reads everything under `prefix` as of one revision, in pages.
pub async fn list_prefix(store: &dyn Store, prefix: &str) -> Result<(Vec<KeyValue>, Revision)> {
    let mut first = RangeRequest::prefix(prefix).limit(PAGE);
    let mut answer = store.range(first.clone()).await?;
    let revision = answer.revision;
    let mut kvs = std::mem::take(&mut answer.kvs);
    let (_, end) = first.range.bounds();
    // Keys are text, so the end of a range of text is text, unless the range is everything.
    let end = end.and_then(|end| String::from_utf8(end).ok()).unwrap_or_else(|| "\u{10ffff}".into());
    while answer.more {
        let Some(last) = kvs.last() else { break };
        first.range = KeyRange::Between(format!("{}\0", last.key), end.clone());
        answer = store.range(first.clone().at(revision)).await?;
        kvs.append(&mut answer.kvs);
    }
    Ok((kvs, revision))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Gadget {
        id: String,
        title: String,
        count: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    }

    impl Record for Gadget {
        const TABLE: &'static str = "test-gadgets";
        const VERSION: u32 = 3;
        fn record_id(&self) -> String {
            self.id.clone()
        }
    }

    const GADGETS: Table<Gadget> = Table::new();

    fn kv(value: Value) -> KeyValue {
        let value = serde_json::to_vec(&value).unwrap().into();
        KeyValue { key: "/k".into(), value, create_revision: 2, mod_revision: 5, version: 1, lease: None }
    }

    fn json_of(bytes: &Bytes) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn a_record_of_a_newer_version_survives_an_update_by_this_one() {
        let newer = json!({"v": 4, "id": "g", "title": "t", "count": 2, "colour": {"red": 1}});
        let mut stored = GADGETS.decode(&kv(newer)).unwrap();
        assert_eq!(stored.mod_revision, 5);
        stored.value.count = 3;
        stored.value.note = Some("n".into());
        let written = json_of(&GADGETS.encode_stored(&stored).unwrap());
        assert_eq!(
            written,
            json!({"v": 4, "id": "g", "title": "t", "count": 3, "note": "n", "colour": {"red": 1}})
        );
    }

    #[test]
    fn old_records_are_migrated_step_by_step_and_written_in_the_new_form() {
        let stored = GADGETS.decode(&kv(json!({"v": 1, "id": "g", "label": "old"}))).unwrap();
        assert_eq!(stored.value, Gadget { id: "g".into(), title: "old".into(), count: 1, note: None });
        let written = json_of(&GADGETS.encode_stored(&stored).unwrap());
        assert_eq!(written, json!({"v": 3, "id": "g", "title": "old", "count": 1}));
    }

    #[test]
    fn a_removed_optional_field_is_gone() {
        let mut stored =
            GADGETS.decode(&kv(json!({"v": 3, "id": "g", "title": "t", "count": 1, "note": "n"}))).unwrap();
        stored.value.note = None;
        assert_eq!(json_of(&GADGETS.encode_stored(&stored).unwrap()).get("note"), None);
    }

    #[test]
    fn broken_records_are_named() {
        for broken in [json!([]), json!({"id": "g"}), json!({"v": 3, "id": "g"})] {
            let error = GADGETS.decode(&kv(broken)).unwrap_err();
            assert!(error.to_string().starts_with("record /k: "), "{error}");
        }
    }

    #[test]
    fn keys_are_safe_and_distinct() {
        assert_eq!(GADGETS.key("a/b"), "/karst/v1/test-gadgets/a%2Fb");
        assert_eq!(GADGETS.id_in("/karst/v1/test-gadgets/x"), Some("x"));
        assert_eq!(GADGETS.id_in("/karst/v1/test-gadgets2/x"), None);
        assert_eq!(index_key("t", "p", "Web.1"), "/karst/v1/index/t/p/Web.1");
        assert_ne!(index_key("t", "a/b", "c"), index_key("t", "a", "b/c"));
        assert_eq!(key_part("ü%"), "%C3%BC%25");
    }
}
