//! Images.

use crate::{Config, ImageId, Name, ProjectId, instance::InstanceKind, template::Templates};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// An image in the store of a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Reference.
    pub id: ImageId,
    /// Project that owns it.
    pub project: ProjectId,
    /// SHA-256 over the files as uploaded (unified: the file; split: metadata then root file system), lower-case hex.
    pub fingerprint: String,
    /// For which kind of instance.
    pub kind: InstanceKind,
    /// `x86_64`.
    pub architecture: String,
    /// Size of the files as uploaded, in bytes.
    pub size: u64,
    /// Name of the uploaded file.
    #[serde(default)]
    pub filename: String,
    /// Visible to untrusted clients.
    #[serde(default)]
    pub public: bool,
    /// `os`, `release`, `description`, …
    #[serde(default)]
    pub properties: Config,
    /// Profiles that instances of it get by default.
    #[serde(default)]
    pub profiles: Vec<String>,
    /// When the image was made.
    pub created_at: Option<Timestamp>,
    /// When it came here.
    pub uploaded_at: Timestamp,
    /// When an instance was last made of it.
    #[serde(default)]
    pub last_used_at: Option<Timestamp>,
    /// Until when whoever made it vouches for it: told, and written into its files; nothing deletes it then.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// The server that it was fetched from.
    #[serde(default)]
    pub origin: Option<ImageOrigin>,
    /// How it is run, of an image of the OCI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application: Option<Application>,
    /// Files of its guests that are made anew.
    #[serde(default, skip_serializing_if = "Templates::is_empty")]
    pub templates: Templates,
    /// Grows with each change.
    pub spec_version: u64,
}

/// What an image server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageServerProtocol {
    /// The API of Incus, LXD and Karst.
    Incus,
    /// Ubuntu's simplestreams.
    Simplestreams,
    /// Registries of the OCI.
    Oci,
}

impl ImageServerProtocol {
    /// Incus' name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Incus => "incus",
            Self::Simplestreams => "simplestreams",
            Self::Oci => "oci",
        }
    }
}

/// A server that has images, and the one of them that is meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateSource {
    /// `https://HOST[:PORT][/PATH]`
    pub server: String,
    /// What it speaks.
    pub protocol: ImageServerProtocol,
    /// Its certificate (PEM) where no authority vouches for it.
    #[serde(default)]
    pub certificate: Option<String>,
    /// Alias there; without one there is nothing to follow.
    #[serde(default)]
    pub alias: Option<String>,
    /// For which kind of instance.
    #[serde(default)]
    pub kind: Option<InstanceKind>,
}

/// Where an image was fetched from, and why it is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOrigin {
    /// The server.
    pub from: UpdateSource,
    /// It is here because an instance was made of it: it goes when nobody uses it for long.
    #[serde(default)]
    pub cached: bool,
    /// A newer one takes its place.
    #[serde(default)]
    pub auto_update: bool,
    /// When a newer one was last looked for by the clock, whatever came of it.
    #[serde(default)]
    pub looked_at: Option<Timestamp>,
}

/// A name for an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageAlias {
    /// Project.
    pub project: ProjectId,
    /// Alias; may contain `/`, as in `debian/12`.
    pub name: String,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// What it names.
    pub image: ImageId,
    /// The image's kind.
    pub kind: InstanceKind,
}

/// Checks an alias: 1 to 128 of `[A-Za-z0-9._/-]`, no empty component, no `.` or `..`.
pub fn check_alias(field: &str, s: &str) -> crate::Result<()> {
    if s.is_empty() || s.len() > 128 || s.split('/').any(|part| Name::parse(field, part).is_err()) {
        return Err(crate::Error::invalid(
            field,
            format!(
                "{s:?} is not an image alias: names of A-Z a-z 0-9 . _ - separated by '/', at most 128 characters"
            ),
        ));
    }
    Ok(())
}

/// The format of a disk that becomes an image by itself: stated, never probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// QEMU's.
    Qcow2,
    /// The bytes of the disk.
    Raw,
    /// VMware's, of one sparse file.
    Vmdk,
    /// An appliance: a tar archive of a description (OVF) and a disk.
    Ova,
}

impl DiskFormat {
    /// Reads the word.
    ///
    /// # Errors
    /// Invalid at `field`.
    pub fn parse(field: &str, s: &str) -> crate::Result<Self> {
        Ok(match s {
            "qcow2" => Self::Qcow2,
            "raw" => Self::Raw,
            "vmdk" => Self::Vmdk,
            "ova" => Self::Ova,
            _ => {
                let text = format!("{s:?} is not a format of disks; qcow2, raw, vmdk and ova are taken");
                return Err(crate::Error::invalid(field, text));
            }
        })
    }

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Vmdk => "vmdk",
            Self::Ova => "ova",
        }
    }
}

/// What unpacking an image's files told about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// SHA-256, lower-case hex.
    pub fingerprint: String,
    /// Bytes as uploaded.
    pub size: u64,
    /// For which kind of instance.
    pub kind: InstanceKind,
    /// `x86_64`.
    pub architecture: String,
    /// `properties` of its metadata.
    pub properties: Config,
    /// Seconds since the epoch, from its metadata.
    pub created_at: i64,
    /// Seconds since the epoch, from its metadata; 0 is never.
    #[serde(default)]
    pub expires_at: i64,
    /// Virtual size of a disk image in bytes; 0 for containers.
    #[serde(default)]
    pub disk_size: u64,
    /// How an image of the OCI is run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application: Option<Application>,
    /// Files of its guests that are made anew.
    #[serde(default, skip_serializing_if = "Templates::is_empty")]
    pub templates: Templates,
}

/// How the one program of an application container (an image of the OCI) is run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Application {
    /// Program and arguments; empty when the image names none.
    pub command: Vec<String>,
    /// Working directory.
    pub cwd: String,
    /// User, as the container numbers it.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Variables.
    pub environment: std::collections::BTreeMap<String, String>,
    /// The signal that asks it to end; `SIGTERM` when the image names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<i32>,
}

/// The kernel's name of a machine that Go names otherwise (`amd64`).
pub fn machine_name(go: &str) -> &str {
    match go {
        "amd64" => "x86_64",
        "arm64" => "aarch64",
        "386" => "i686",
        other => other,
    }
}
