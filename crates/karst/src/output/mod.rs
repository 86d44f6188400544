//! What commands print: tables for people, JSON, YAML and CSV for programs, all to stdout.

pub mod progress;
pub mod table;
pub mod units;

use std::io::{self, Write};

use serde_json::Value;

use crate::error::{Error, Result};

/// Writes to stdout; a reader that has gone away ends the program quietly.
pub fn print(text: &str) -> Result<()> {
    write(text.as_bytes())
}

/// Like [`print()`], with a newline.
pub fn line(text: &str) -> Result<()> {
    let mut whole = String::with_capacity(text.len() + 1);
    whole.push_str(text);
    whole.push('\n');
    write(whole.as_bytes())
}

/// Bytes to stdout.
pub fn write(data: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(data).and_then(|()| stdout.flush()).map_err(stdout_error)
}

/// What a failed write to stdout means.
pub fn stdout_error(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Error::ClosedPipe,
        _ => Error::from(error),
    }
}

/// As YAML, ending in a newline.
pub fn to_yaml(value: &Value) -> Result<String> {
    serde_yaml_ng::to_string(value).map_err(Error::local)
}

/// From YAML, where an empty text is `null`.
pub fn from_yaml(text: &str) -> Result<Value> {
    let value: Value =
        serde_yaml_ng::from_str(text).map_err(|error| Error::Local(format!("no valid YAML: {error}")))?;
    Ok(value)
}

/// The text of a JSON scalar without quotes; empty for `null`.
pub fn scalar(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The text of a member of an object; empty where there is none.
pub fn member(object: &Value, name: &str) -> String {
    object.get(name).map(scalar).unwrap_or_default()
}

/// `YES` or `NO`, as Incus' tables have it.
pub fn yes_no(value: bool) -> String {
    if value { "YES" } else { "NO" }.to_owned()
}
