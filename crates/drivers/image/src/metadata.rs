//! `metadata.yaml` of Incus' image format.

use karst_model::{
    Config, Error, Result,
    template::{TemplateRule, WrittenRule, read_rules},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What `metadata.yaml` says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Metadata {
    /// In the kernel's name, such as `x86_64`.
    pub architecture: String,
    /// Seconds since the epoch.
    #[serde(default)]
    pub creation_date: i64,
    /// Seconds since the epoch; 0 is never.
    #[serde(default)]
    pub expiry_date: i64,
    /// `os`, `release`, `description`, …
    #[serde(default)]
    pub properties: Config,
    /// Files of guests that are made anew, by path; how they are made lies in `templates/` beside.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub templates: BTreeMap<String, TemplateRule>,
}

impl Metadata {
    /// Parses the file; called inside the worker.
    ///
    /// # Errors
    /// Invalid at `field`, saying what is wrong.
    pub fn parse(field: &str, text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Raw {
            architecture: Option<String>,
            #[serde(default)]
            creation_date: i64,
            #[serde(default)]
            expiry_date: i64,
            #[serde(default)]
            properties: Option<BTreeMap<String, serde_yaml_ng::Value>>,
            #[serde(default)]
            templates: Option<BTreeMap<String, Option<WrittenRule>>>,
        }
        let raw: Raw = serde_yaml_ng::from_slice(text)
            .map_err(|e| Error::invalid(field, "metadata.yaml cannot be read").with_context(e))?;
        let architecture = match raw.architecture.as_deref().unwrap_or_default() {
            "x86_64" | "amd64" => "x86_64",
            "aarch64" | "arm64" => "aarch64",
            "" => return Err(Error::invalid(field, "metadata.yaml names no architecture")),
            other => {
                let shown: String = other.chars().take(32).collect();
                return Err(Error::invalid(
                    field,
                    format!(
                        "metadata.yaml names the architecture {shown:?}; x86_64 and aarch64 are known here"
                    ),
                ));
            }
        };
        let mut properties = Config::default();
        for (key, value) in raw.properties.unwrap_or_default() {
            let value = match value {
                serde_yaml_ng::Value::String(s) => s,
                serde_yaml_ng::Value::Bool(b) => b.to_string(),
                serde_yaml_ng::Value::Number(n) => n.to_string(),
                serde_yaml_ng::Value::Null => continue,
                _ => {
                    return Err(Error::invalid(
                        field,
                        format!("the property {key:?} of metadata.yaml is not a text"),
                    ));
                }
            };
            if key.len() > 128 || value.len() > 4096 || properties.len() >= 256 {
                return Err(Error::invalid(field, "metadata.yaml has too many or too long properties"));
            }
            properties.insert(key, value);
        }
        let written = raw.templates.into_iter().flatten();
        let templates =
            read_rules(field, written.map(|(path, rule)| (path, rule.unwrap_or_default())).collect())?;
        Ok(Self {
            architecture: architecture.into(),
            creation_date: raw.creation_date,
            expiry_date: raw.expiry_date,
            properties,
            templates,
        })
    }

    /// As the file.
    ///
    /// # Errors
    /// Internal when it cannot be written, which does not happen.
    pub fn to_yaml(&self) -> Result<String> {
        serde_yaml_ng::to_string(self).map_err(|e| Error::internal("image metadata could not be written", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_incus_writes_and_refuses_the_rest() {
        let text = b"architecture: amd64\ncreation_date: 1700000000\nproperties:\n  os: Debian\n  serial: 20231114\ntemplates: {}\n";
        let m = Metadata::parse("image", text).unwrap();
        assert_eq!((m.architecture.as_str(), m.creation_date), ("x86_64", 1_700_000_000));
        assert_eq!(m.properties.get("serial").map(String::as_str), Some("20231114"));
        assert_eq!(Metadata::parse("image", m.to_yaml().unwrap().as_bytes()).unwrap(), m);
        for wrong in [
            "",
            "architecture: [1]",
            "architecture: vax",
            "properties: {os: x}",
            "a: b: c",
            "architecture: x86_64\nproperties: {a: {b: c}}",
        ] {
            assert!(
                Metadata::parse("image", wrong.as_bytes()).unwrap_err().is(karst_model::ErrorKind::Invalid),
                "{wrong}"
            );
        }
    }
}
