//! Reading of JSON bodies field by field, so that what is wrong is named by its path, null means absent (Go's clients
//! send it for empty maps and lists), and an unknown field is refused with the nearest known one.

use crate::observe::{self, FieldKind, Read};
use karst_model::{Config, Error, Result, device::Devices, error::nearest};
use serde_json::{Map, Value};
use std::cell::RefCell;

/// A JSON object being read.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
    path: String,
    known: RefCell<Vec<&'static str>>,
}

impl Fields {
    /// Takes a body.
    ///
    /// # Errors
    /// Invalid, when it is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|e| Error::invalid("body", format!("the body is not valid JSON: {e}")))?;
        Self::of(value, "")
    }

    /// Takes a value at `path`.
    ///
    /// # Errors
    /// Invalid, when it is no object.
    pub fn of(value: Value, path: &str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, path: path.to_owned(), known: RefCell::default() }),
            Value::Null if !path.is_empty() => {
                Ok(Self { map: Map::new(), path: path.to_owned(), known: RefCell::default() })
            }
            other => Err(wrong(if path.is_empty() { "body" } else { path }, "an object", &other)),
        }
    }

    fn at(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The value of `name`, unless absent or null.
    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.taken(name, FieldKind::Any)
    }

    fn taken(&mut self, name: &'static str, kind: FieldKind) -> Option<Value> {
        observe::note(|| Read::Field(self.at(name), kind));
        self.known.borrow_mut().push(name);
        self.map.remove(name).filter(|v| !v.is_null())
    }

    /// Is it there and not null?
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|v| !v.is_null())
    }

    /// A text.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>> {
        match self.taken(name, FieldKind::Text) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(wrong(&self.at(name), "a text", &other)),
        }
    }

    /// A text that must be there and not be empty.
    ///
    /// # Errors
    /// Invalid.
    pub fn need_text(&mut self, name: &'static str) -> Result<String> {
        match self.text(name)? {
            Some(s) if !s.is_empty() => Ok(s),
            _ => Err(Error::invalid(self.at(name), format!("{} is missing", self.at(name)))),
        }
    }

    /// `true` or `false`; false when absent.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn flag(&mut self, name: &'static str) -> Result<bool> {
        match self.taken(name, FieldKind::Flag) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(b),
            Some(other) => Err(wrong(&self.at(name), "true or false", &other)),
        }
    }

    /// A whole number.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn integer(&mut self, name: &'static str) -> Result<Option<i64>> {
        match self.taken(name, FieldKind::Integer) {
            None => Ok(None),
            Some(v) => match v.as_i64() {
                Some(n) => Ok(Some(n)),
                None => Err(wrong(&self.at(name), "a whole number", &v)),
            },
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn texts(&mut self, name: &'static str) -> Result<Option<Vec<String>>> {
        let path = self.at(name);
        match self.taken(name, FieldKind::Texts) {
            None => Ok(None),
            Some(Value::Array(list)) => list
                .into_iter()
                .enumerate()
                .map(|(i, v)| match v {
                    Value::String(s) => Ok(s),
                    other => Err(wrong(&format!("{path}[{i}]"), "a text", &other)),
                })
                .collect::<Result<_>>()
                .map(Some),
            Some(other) => Err(wrong(&path, "a list of texts", &other)),
        }
    }

    /// Is the text `key` of the nested object `name` this one? Takes nothing.
    pub fn is(&self, name: &str, key: &str, text: &str) -> bool {
        self.map.get(name).and_then(|o| o.get(key)).is_some_and(|v| v == text)
    }

    /// Has the nested object `name` a `key` that is not null? Takes nothing.
    pub fn nested(&self, name: &str, key: &str) -> bool {
        self.map.get(name).and_then(|o| o.get(key)).is_some_and(|v| !v.is_null())
    }

    /// A nested object; an empty one when absent.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn object(&mut self, name: &'static str) -> Result<Fields> {
        let path = self.at(name);
        Self::of(self.taken(name, FieldKind::Object).unwrap_or(Value::Null), &path)
    }

    /// A configuration: texts by key. Numbers and booleans become texts, as Incus does; null removes nothing here and is
    /// the empty text.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn config(&mut self, name: &'static str) -> Result<Option<Config>> {
        let path = self.at(name);
        self.taken(name, FieldKind::Config).map(|v| config_of(v, &path)).transpose()
    }

    /// Devices: configurations by name, without keys that say nothing.
    ///
    /// # Errors
    /// Invalid, when it is something else.
    pub fn devices(&mut self, name: &'static str) -> Result<Option<Devices>> {
        let path = self.at(name);
        match self.taken(name, FieldKind::Devices) {
            None => Ok(None),
            Some(Value::Object(map)) => map
                .into_iter()
                .map(|(device, keys)| {
                    let mut keys = config_of(keys, &format!("{path}.{device}"))?;
                    // How Incus' clients take a key away.
                    keys.retain(|_, value| !value.is_empty());
                    Ok((device, keys))
                })
                .collect::<Result<_>>()
                .map(Some),
            Some(other) => Err(wrong(&path, "an object", &other)),
        }
    }

    /// Ends the reading. `ignored` names what views show and changes carry back without meaning (read-only fields), or what
    /// means nothing here; anything else left over is refused.
    ///
    /// # Errors
    /// Invalid, naming the field and the nearest known one.
    pub fn finish(self, ignored: &[&'static str]) -> Result<()> {
        for name in ignored {
            observe::note(|| Read::Carried(self.at(name)));
        }
        let known = self.known.borrow();
        for name in self.map.keys() {
            if ignored.contains(&name.as_str()) {
                continue;
            }
            let at = self.at(name);
            let hint = match nearest(name, known.iter().copied()) {
                Some(n) => format!("; did you mean {n:?}?"),
                None => format!("; known are {}", known.join(", ")),
            };
            return Err(Error::invalid(at.clone(), format!("unknown field {at:?}{hint}")));
        }
        Ok(())
    }
}

fn config_of(value: Value, path: &str) -> Result<Config> {
    match value {
        Value::Null => Ok(Config::new()),
        Value::Object(map) => map
            .into_iter()
            .map(|(key, v)| {
                let text = match v {
                    Value::String(s) => s,
                    Value::Bool(b) => b.to_string(),
                    Value::Number(n) => n.to_string(),
                    Value::Null => String::new(),
                    other => return Err(wrong(&format!("{path}.{key}"), "a text", &other)),
                };
                Ok((key, text))
            })
            .collect(),
        other => Err(wrong(path, "an object", &other)),
    }
}

fn wrong(path: &str, wanted: &str, found: &Value) -> Error {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Error::invalid(path, format!("{path} must be {wanted}, not {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        for (body, field) in [
            ("", "body"),
            ("[]", "body"),
            ("{\"name\": 7}", "name"),
            ("{\"config\": {\"a\": []}}", "config.a"),
            ("{\"devices\": {\"root\": 5}}", "devices.root"),
            ("{\"profiles\": [1]}", "profiles[0]"),
            ("{\"nmae\": \"x\"}", "nmae"),
        ] {
            let read = || -> Result<()> {
                let mut f = Fields::parse(body.as_bytes())?;
                f.text("name")?;
                f.config("config")?;
                f.devices("devices")?;
                f.texts("profiles")?;
                f.finish(&[])
            };
            let e = read().unwrap_err();
            assert_eq!(e.field.as_deref(), Some(field), "{body}: {e}");
        }
    }

    #[test]
    fn null_is_absent_and_an_unknown_field_offers_the_nearest() {
        let mut f = Fields::parse(br#"{"name":null,"config":null,"descripton":"x"}"#).unwrap();
        assert_eq!(f.text("name").unwrap(), None);
        assert_eq!(f.config("config").unwrap(), None);
        f.text("description").unwrap();
        assert!(f.finish(&[]).unwrap_err().message.contains("did you mean \"description\""));
    }
}
