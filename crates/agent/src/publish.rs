//! What the calls carry that make images of volumes, and volumes of images again.

use crate::VolumeRef;
use karst_model::{
    ByteSize, ImageId, SnapshotId, backup::Compression, instance::InstanceKind, spec::VolumeSource,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A volume that becomes an image: a unified archive of `metadata.yaml` and `rootfs/`, or `rootfs.img` (qcow2).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImagePublish {
    /// The image.
    pub image: ImageId,
    /// For which kind of instance.
    pub kind: InstanceKind,
    /// The volume.
    pub volume: VolumeRef,
    /// As it was then; `None`: now, by the rules of a snapshot.
    pub at: Option<SnapshotId>,
    /// Content of `metadata.yaml`.
    pub metadata: serde_json::Value,
    /// What lies in `templates/`, by name.
    #[serde(default)]
    pub templates: BTreeMap<String, String>,
    /// How the archive is compressed.
    pub compression: Compression,
}

/// A volume that begins anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRebuild {
    /// Which.
    pub volume: VolumeRef,
    /// What it begins as: an image or nothing.
    pub source: VolumeSource,
    /// Size of a disk; no image may be larger.
    pub size: Option<ByteSize>,
}
