//! Images made of volumes, and volumes that begin anew.
//!
//! The archive is packed by a worker that sees the volume's content and nothing else, and then taken in as any foreign
//! archive is: what a guest had on its disk is no more trusted than what a stranger sends.

use crate::{
    RealAgent,
    backups::{packed, template_texts, yaml},
    storage::{STREAM, contents, converted, open},
};
use karst_agent::{ImagePublish, VolumeRebuild};
use karst_host::{Program, sandbox::Limits};
use karst_image::{
    Staged, Upload,
    backup::{Kind, Piece},
};
use karst_model::{
    Error, Result, image::ImageFacts, instance::InstanceKind, spec::VolumeSource, storage::VolumeContent,
};
use karst_storage::{Format, Source};
use std::{fs::File, os::unix::fs::OpenOptionsExt};

fn content(kind: InstanceKind) -> VolumeContent {
    match kind {
        InstanceKind::Container => VolumeContent::Filesystem,
        InstanceKind::VirtualMachine => VolumeContent::Block,
    }
}

impl RealAgent {
    pub(crate) async fn publish_image(&self, request: ImagePublish) -> Result<ImageFacts> {
        let _making = self.lock(request.image.0).await;
        if let Ok(facts) = self.images.facts(request.image).await {
            return Ok(facts);
        }
        let at = request.volume;
        let lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        if pool.inspect(at.volume).await?.content != content(request.kind) {
            return Err(Error::invalid("kind", format!("the volume is not one of a {}", request.kind)));
        }
        if request.at.is_none() {
            self.still(&*pool, at.volume).await?;
        }
        // The archive, and a disk in the form in which it travels; gone in the end.
        let room = self.staging.work()?;
        let archive = room.path().join("image");
        let out = File::options().append(true).create_new(true).mode(0o600).open(&archive)?;
        let reading = contents(&*pool)?.read(at.volume, request.at).await?;
        let located = &reading.located;
        let mut worker = self.worker().stdout(out.into());
        let mut disk = None;
        let (place, kind) = if located.format == Format::Directory {
            worker = crate::storage::tree(worker, &reading).await?;
            ("rootfs", Kind::Tree)
        } else {
            let made = self.staging.work()?;
            let from = if located.format == Format::Raw { "raw" } else { "qcow2" };
            let mut convert = self
                .worker()
                .readable("disk.img", open(&located.path, false)?)
                .writable("out", open(made.path(), false)?);
            if let Some(base) = &located.backing {
                convert = convert.readable("base.img", open(base, false)?);
            }
            let args = ["convert", "-U", "-f", from, "-O", "qcow2", "/disk.img", "/out/disk"];
            let convert =
                |left| convert.limits(Limits { file_size: left, ..STREAM }).exec(Program::QemuImg, &args);
            converted(made.fill(convert).await?)?;
            worker = worker.readable("disk.img", open(&made.path().join("disk"), false)?);
            disk = Some(made);
            ("rootfs.img", Kind::Disk)
        };
        let mut texts = vec![("metadata.yaml".into(), Some(yaml(&request.metadata)?))];
        texts.extend(template_texts("", &request.templates)?);
        let piece = Piece {
            texts,
            content: Some((place.into(), kind)),
            compression: request.compression,
            last: true,
        };
        let ended = worker.call("backup-pack", serde_json::to_value(piece)?).await?;
        drop((disk, reading, lock));
        packed(&ended)?;
        self.images.import(request.image, Upload::Unified { image: Staged::Packed(archive) }).await
    }

    pub(crate) async fn rebuild_volume(&self, request: VolumeRebuild) -> Result<()> {
        let at = request.volume;
        let _lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        let now = pool.inspect(at.volume).await?;
        let mut in_full = false;
        let mut image_held = None;
        let source = match request.source {
            VolumeSource::Empty => Source::Empty,
            VolumeSource::Image { image, full } => {
                in_full = full;
                if content(self.images.facts(image).await?.kind) != now.content {
                    return Err(Error::invalid("image", "the image is one for another kind of instance"));
                }
                let source = self.image_source(image).await?;
                image_held = Some(self.images.hold(image).await?);
                source
            }
            VolumeSource::Copy { .. } | VolumeSource::Encrypted { .. } => {
                return Err(Error::invalid("source", "a volume is rebuilt of an image, or empty"));
            }
        };
        if let (Source::Disk { size, .. }, Some(room)) = (&source, request.size)
            && *size > room.bytes()
        {
            return Err(Error::invalid("size", "the disk of the image is larger than this one"));
        }
        self.unused(at.volume).await?;
        let contents = contents(&*pool)?;
        let made = match (&source, now.content.is_disk()) {
            (Source::Empty, true) => {
                let filling = contents.begin(at.volume).await?;
                let disk = File::options()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(filling.directory().join("disk.img"))?;
                disk.set_len(request.size.or(now.size).unwrap_or_default().bytes())?;
                drop(disk);
                filling.commit().await?
            }
            _ => contents.replace(at.volume, &source.clone().in_full(in_full)).await?,
        };
        drop(image_held);
        match request.size {
            Some(wanted) if made.size != Some(wanted) => pool.resize(at.volume, wanted).await.map(drop),
            _ => Ok(()),
        }
    }
}
