//! What the calls about images do: staged parts, imports, builds, files.

use crate::{RealAgent, agent::blocking};
use karst_agent::{
    AgentEvent, ImageBuild, ImageFile, ImageImport, ImagePart, ImageStage, ImageStaged, WithFds,
};
use karst_image::{Staged, Upload};
use karst_model::{Error, ImageId, Result, image::ImageFacts};
use std::sync::Arc;

impl RealAgent {
    pub(crate) async fn stage(&self, request: ImageStage) -> Result<WithFds<ImageStaged>> {
        let staging = self.staging.clone();
        let (file, value) = blocking(move || staging.stage(request.image, request.part)).await?;
        Ok(WithFds { value, fds: vec![file.into()] })
    }

    pub(crate) async fn import(&self, request: ImageImport) -> Result<ImageFacts> {
        let _lock = self.lock(request.image.0).await;
        if let Ok(facts) = self.images.facts(request.image).await {
            return Ok(facts);
        }
        if let Some(format) = request.disk {
            if request.parts != [ImagePart::Disk] {
                return Err(Error::invalid("parts", "a disk is one part"));
            }
            let staging = self.staging.clone();
            let disk = blocking(move || staging.read(request.image, ImagePart::Disk)).await?.into();
            let facts = self.images.import(request.image, Upload::Disk { disk, format }).await?;
            let staging = self.staging.clone();
            blocking(move || staging.drop_image(request.image)).await?;
            return Ok(facts);
        }
        let mut parts = vec![];
        for part in &request.parts {
            let (staging, part) = (self.staging.clone(), *part);
            let file = blocking(move || staging.read(request.image, part)).await?;
            parts.push(Staged::Foreign(file.into()));
        }
        let mut parts = parts.into_iter();
        let upload = match (request.parts.as_slice(), parts.next(), parts.next()) {
            ([ImagePart::Unified], Some(image), None) => Upload::Unified { image },
            ([ImagePart::Metadata, ImagePart::Rootfs | ImagePart::Disk], Some(metadata), Some(rootfs)) => {
                Upload::Split { metadata, rootfs }
            }
            _ => {
                let text = "an image is one unified part, or metadata and a root file system or disk";
                return Err(Error::invalid("parts", text));
            }
        };
        let facts = self.images.import(request.image, upload).await?;
        let staging = self.staging.clone();
        blocking(move || staging.drop_image(request.image)).await?;
        Ok(facts)
    }

    pub(crate) async fn build(&self, request: ImageBuild) -> Result<ImageFacts> {
        let _lock = self.lock(request.image.0).await;
        if let Ok(facts) = self.images.facts(request.image).await {
            return Ok(facts);
        }
        let (events, image) = (self.events.clone(), request.image);
        let progress: karst_image::Progress = Arc::new(move |stage: &str, percent| {
            events.publish(&AgentEvent::ImageProgress {
                image,
                stage: stage.to_owned(),
                percent: Some(percent),
            });
        });
        let upload = self.images.build(&request.recipe, request.kind, false, progress).await?;
        self.images.import(request.image, upload).await
    }

    pub(crate) async fn delete_image(&self, image: ImageId) -> Result<()> {
        let _lock = self.lock(image.0).await;
        let staging = self.staging.clone();
        blocking(move || staging.drop_image(image)).await?;
        self.images.delete(image).await?;
        for (_, pool) in self.all_pools() {
            pool.forget_image(image).await?;
        }
        Ok(())
    }

    pub(crate) async fn export(&self, image: ImageId) -> Result<WithFds<Vec<ImageFile>>> {
        let (mut value, mut fds) = (vec![], vec![]);
        for part in self.images.export(image).await?.parts {
            value.push(ImageFile {
                part: match part.field {
                    "metadata" => ImagePart::Metadata,
                    "rootfs" => ImagePart::Rootfs,
                    "rootfs.img" => ImagePart::Disk,
                    _ => ImagePart::Unified,
                },
                size: part.size,
                filename: part.filename,
            });
            fds.push(part.file);
        }
        Ok(WithFds { value, fds })
    }
}
