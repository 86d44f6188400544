//! Images and their aliases.

use super::time;
use jiff::Timestamp;
use karst_model::{
    Config,
    image::{Image, ImageAlias, UpdateSource},
};
use serde::Serialize;

/// An image.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct ImageView<'a> {
    pub auto_update: bool,
    pub properties: &'a Config,
    pub public: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_source: Option<SourceView<'a>>,
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

/// The server that an image follows.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct SourceView<'a> {
    pub alias: &'a str,
    pub certificate: &'a str,
    pub protocol: &'static str,
    pub server: &'a str,
    pub image_type: &'static str,
}

impl<'a> SourceView<'a> {
    fn of(from: &'a UpdateSource) -> Option<Self> {
        Some(Self {
            alias: from.alias.as_deref()?,
            certificate: from.certificate.as_deref().unwrap_or_default(),
            protocol: from.protocol.as_str(),
            server: &from.server,
            image_type: from.kind.map_or("", |k| k.as_str()),
        })
    }
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
            auto_update: image.origin.as_ref().is_some_and(|o| o.auto_update),
            update_source: image.origin.as_ref().and_then(|o| SourceView::of(&o.from)),
            properties: &image.properties,
            public: image.public,
            expires_at: image.expires_at,
            profiles: &image.profiles,
            aliases: aliases.map(|a| AliasName { name: &a.name, description: &a.description }).collect(),
            architecture: &image.architecture,
            cached: image.origin.as_ref().is_some_and(|o| o.cached),
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
