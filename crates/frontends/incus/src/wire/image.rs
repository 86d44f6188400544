//! Images and their aliases.

use super::time;
use jiff::Timestamp;
use karst_model::{
    Config,
    image::{Image, ImageAlias},
};
use serde::Serialize;

/// An image.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct ImageView<'a> {
    pub auto_update: bool,
    pub properties: &'a Config,
    pub public: bool,
    #[serde(serialize_with = "time")]
    pub expires_at: Option<Timestamp>,
    pub profiles: &'a [String],
    pub aliases: Vec<AliasName<'a>>,
    pub architecture: &'a str,
    pub cached: bool,
    pub filename: &'a str,
    pub fingerprint: &'a str,
    pub size: u64,
    #[serde(rename = "type")]
    pub kind: &'static str,
    #[serde(serialize_with = "time")]
    pub created_at: Option<Timestamp>,
    #[serde(serialize_with = "time")]
    pub last_used_at: Option<Timestamp>,
    pub uploaded_at: Timestamp,
    pub project: &'a str,
}

/// An alias within its image.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct AliasName<'a> {
    pub name: &'a str,
    pub description: &'a str,
}

impl<'a> ImageView<'a> {
    /// Of a record with its aliases.
    pub fn of(image: &'a Image, aliases: impl Iterator<Item = &'a ImageAlias>, project: &'a str) -> Self {
        Self {
            auto_update: false,
            properties: &image.properties,
            public: image.public,
            expires_at: image.expires_at,
            profiles: &image.profiles,
            aliases: aliases.map(|a| AliasName { name: &a.name, description: &a.description }).collect(),
            architecture: &image.architecture,
            cached: false,
            filename: &image.filename,
            fingerprint: &image.fingerprint,
            size: image.size,
            kind: image.kind.as_str(),
            created_at: image.created_at,
            last_used_at: image.last_used_at,
            uploaded_at: image.uploaded_at,
            project,
        }
    }
}

/// An alias.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct AliasView<'a> {
    pub description: &'a str,
    pub target: &'a str,
    pub name: &'a str,
    #[serde(rename = "type")]
    pub kind: &'static str,
}

impl<'a> AliasView<'a> {
    /// Of a record; `target` is its image's fingerprint.
    pub fn of(alias: &'a ImageAlias, target: &'a str) -> Self {
        Self { description: &alias.description, target, name: &alias.name, kind: alias.kind.as_str() }
    }
}
