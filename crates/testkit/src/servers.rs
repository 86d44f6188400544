//! An image server that does as it is told.

use async_trait::async_trait;
use karst_agent::ImagePart;
use karst_engine::images::{
    push::PushedImage,
    remote::{ImageServers, Parts, RemoteImage, RemoteSource},
};
use karst_model::{
    Config, Error, Result,
    image::{ImageServerProtocol, UpdateSource},
    instance::InstanceKind,
};
use sha2::{Digest, Sha256};
use std::{
    io::{Read, Write},
    sync::Mutex,
};

/// A server with one image, `tiny`.
#[derive(Default)]
pub struct OneImage(pub Mutex<Behaviour>);

/// What it does.
#[derive(Clone, Default)]
pub struct Behaviour {
    /// The image.
    pub content: String,
    /// What comes instead of the content.
    pub lie: Option<String>,
    /// It breaks off.
    pub broken: bool,
    /// How often it was asked for the files.
    pub fetched: usize,
    /// The secret that it takes an image for.
    pub awaits: String,
    /// What was brought: fingerprint and content.
    pub brought: Option<(String, String)>,
}

#[async_trait]
impl ImageServers for OneImage {
    async fn find(&self, source: &RemoteSource) -> Result<RemoteImage> {
        let now = self.0.lock().unwrap().clone();
        let fingerprint = format!("{:x}", Sha256::digest(&now.content));
        if source.reference != "tiny" && !fingerprint.starts_with(&source.reference) {
            return Err(Error::not_found("the image server has no such image"));
        }
        Ok(RemoteImage {
            fingerprint,
            kind: InstanceKind::Container,
            size: now.content.len() as u64,
            filename: "tiny.tar".into(),
            properties: Config::from([("os".into(), "Tiny".into())]),
            expires_at: None,
            by_alias: source.reference == "tiny",
            files: vec![],
        })
    }

    async fn fetch(&self, _: &RemoteSource, _: &RemoteImage, to: &dyn Parts) -> Result<Vec<ImagePart>> {
        let now = {
            let mut now = self.0.lock().unwrap();
            now.fetched += 1;
            now.clone()
        };
        let part = to.open(ImagePart::Unified).await?;
        let text = now.lie.unwrap_or(now.content);
        std::fs::File::from(part.file).write_all(text.as_bytes())?;
        to.progress(text.len() as u64);
        match now.broken {
            true => Err(Error::unavailable("the download broke off")),
            false => Ok(vec![ImagePart::Unified]),
        }
    }

    async fn push(
        &self,
        target: &RemoteSource,
        image: PushedImage,
        told: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()> {
        let mut content = String::new();
        for (_, fd) in image.files {
            std::fs::File::from(fd).read_to_string(&mut content)?;
        }
        told(content.len() as u64);
        let mut now = self.0.lock().unwrap();
        if now.broken {
            return Err(Error::unavailable("the upload broke off"));
        }
        if target.secret.as_deref() != Some(now.awaits.as_str()) {
            return Err(Error::forbidden("the server awaits no such image"));
        }
        now.brought = Some((image.fingerprint, content));
        Ok(())
    }
}

/// Something of this server.
pub fn source(reference: &str) -> RemoteSource {
    RemoteSource {
        from: UpdateSource {
            server: "https://images.example".into(),
            protocol: ImageServerProtocol::Simplestreams,
            certificate: None,
            alias: None,
            kind: None,
        },
        reference: reference.into(),
        secret: None,
        project: None,
        login: None,
    }
}
