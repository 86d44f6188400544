//! Images of volumes, and volumes of images again, on a simulated host.

use super::{SimulatedAgent, state::Image, storage::Held};
use crate::{
    calls::ImagePart,
    publish::{ImagePublish, VolumeRebuild},
};
use karst_model::{
    ByteSize, Config, Error, Result,
    image::ImageFacts,
    instance::InstanceKind,
    spec::VolumeSource,
    storage::VolumeContent,
    template::{Templates, read_rules},
};
use sha2::{Digest, Sha256};

fn content(kind: InstanceKind) -> VolumeContent {
    match kind {
        InstanceKind::Container => VolumeContent::Filesystem,
        InstanceKind::VirtualMachine => VolumeContent::Block,
    }
}

impl SimulatedAgent {
    pub(super) fn publish_image(&self, request: &ImagePublish) -> Result<ImageFacts> {
        let mut state = self.settled();
        if let Some(image) = state.images.get(&request.image) {
            return Ok(image.facts.clone());
        }
        let (held, size, found) = state.held(request.volume, request.at)?;
        if found != content(request.kind) {
            return Err(Error::invalid("kind", "the volume holds something else"));
        }
        let properties: Config =
            serde_json::from_value(request.metadata["properties"].clone()).unwrap_or_default();
        let rules = serde_json::from_value(request.metadata["templates"].clone()).unwrap_or_default();
        let templates = Templates { rules: read_rules("", rules)?, files: request.templates.clone() };
        let text = serde_json::to_vec(&(&request.metadata, &templates, &held, request.compression))?;
        let part = ImagePart::Unified;
        let parts = vec![(part, super::files::content(&text)?.into(), text.len() as u64)];
        let facts = ImageFacts {
            application: None,
            properties,
            templates,
            expires_at: request.metadata["expiry_date"].as_i64().unwrap_or_default(),
            disk_size: size.filter(|_| found.is_disk()).map_or(0, ByteSize::bytes),
            ..self.facts(&Sha256::digest(&text), text.len() as u64, request.kind, "published")
        };
        state.images.insert(request.image, Image { facts: facts.clone(), parts, held });
        Ok(facts)
    }

    pub(super) fn rebuild_volume(&self, request: VolumeRebuild) -> Result<()> {
        let mut state = self.settled();
        let now = state.volume(request.volume)?.spec.content;
        let full = matches!(request.source, VolumeSource::Image { full: true, .. });
        let held = match request.source {
            VolumeSource::Empty => Held::default(),
            VolumeSource::Image { image, .. } => {
                let found = state.images.get(&image);
                let image =
                    found.ok_or_else(|| Error::not_found(format!("image {image} is not on this host")))?;
                if content(image.facts.kind) != now {
                    return Err(Error::invalid("image", "the image is one for another kind of instance"));
                }
                if request.size.is_some_and(|s| s.bytes() < image.facts.disk_size) {
                    return Err(Error::invalid("size", "the disk of the image is larger than this one"));
                }
                image.held.clone()
            }
            VolumeSource::Copy { .. } | VolumeSource::Encrypted { .. } => {
                return Err(Error::invalid("source", "a volume is rebuilt of an image, or empty"));
            }
        };
        state.writer(request.volume, false)?;
        let volume = state.volume_mut(request.volume)?;
        (volume.held, volume.full) = (held, full);
        if now.is_disk() {
            volume.size = request.size.or(volume.size);
        }
        Ok(())
    }
}
