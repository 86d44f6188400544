//! Image servers as sources: simplestreams, other servers of this API, registries. The server fetches; its address goes with
//! each request, and nothing is kept of it here.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::completion::complete;
use crate::{
    client::{Kind, Url},
    context::{Context, read_text},
    error::{Error, Result},
    output, password,
};

/// Which server an image comes from.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Server {
    /// Image server that has it: https://HOST[:PORT][/PATH]
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// What the image server speaks: simplestreams (the default), incus, lxd or oci
    #[arg(long, value_name = "PROTOCOL", requires = "server", value_parser = ["simplestreams", "incus", "lxd", "oci"])]
    protocol: Option<String>,
    /// Certificate of the image server (PEM), where no authority vouches for it
    #[arg(long, value_name = "FILE", requires = "server")]
    server_certificate: Option<PathBuf>,
}

/// Options of `image copy`.
#[derive(Debug, clap::Args)]
pub struct ImageCopy {
    /// Alias or fingerprint of the image there
    image: String,
    #[command(flatten)]
    server: Server,
    /// That for virtual machines, where there are both of this name
    #[arg(long)]
    vm: bool,
    /// An alias here (repeatable)
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,
    /// For everyone, also without a certificate
    #[arg(long)]
    public: bool,
    /// Follow the alias: newer images are fetched as they come
    #[arg(long)]
    auto_update: bool,
}

/// Options of `image refresh`.
#[derive(Debug, clap::Args)]
pub struct ImageRefresh {
    /// Aliases or fingerprints of images that came from a server
    #[arg(required = true, add = complete(Kind::Image))]
    images: Vec<String>,
}

/// Options of `image await`.
#[derive(Debug, clap::Args)]
pub struct ImageAwait {
    /// Fingerprint of the image
    fingerprint: String,
    /// An alias here (repeatable)
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,
    /// For everyone, also without a certificate
    #[arg(long)]
    public: bool,
}

/// Options of `image push`.
#[derive(Debug, clap::Args)]
pub struct ImagePush {
    /// Alias or fingerprint
    #[arg(add = complete(Kind::Image))]
    image: String,
    /// The server that awaits it: https://HOST[:PORT]
    server: String,
    /// Certificate of that server (PEM), where no authority vouches for it
    #[arg(long, value_name = "FILE")]
    server_certificate: Option<PathBuf>,
    /// Project there
    #[arg(long, value_name = "PROJECT")]
    target_project: Option<String>,
    /// File with the secret that `image await` printed there; default: stdin
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl ImageAwait {
    /// Prints the secret by which another server can bring the image.
    pub async fn run(self, context: &Context) -> Result<()> {
        let aliases: Vec<Value> = self.alias.iter().map(|name| json!({"name": name})).collect();
        let source = json!({"mode": "push", "fingerprint": self.fingerprint});
        let body = json!({"source": source, "aliases": aliases, "public": self.public});
        let answer = context.client.post(&Url::new(&["images"]), &body).await?;
        match answer.metadata["metadata"]["secret"].as_str() {
            Some(secret) => output::line(secret),
            None => Err(Error::local("the server gave no secret")),
        }
    }
}

impl ImagePush {
    /// Has the image brought to the server, and waits until it is there.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let fingerprint = super::image::resolve(client, &self.image).await?;
        let secret = password::read(self.file.as_deref(), &format!("Secret of {}", self.server))?;
        let mut body = json!({"target": self.server, "secret": secret});
        if let Some(file) = &self.server_certificate {
            body["certificate"] = json!(read_text(file)?);
        }
        if let Some(project) = &self.target_project {
            body["project"] = json!(project);
        }
        let answer = client.post(&Url::new(&["images", &fingerprint, "export"]), &body).await?;
        context.finish(answer, format!("pushing {}", self.image)).await.map(drop)
    }
}

impl Server {
    /// Whether one is named.
    pub fn is_named(&self) -> bool {
        self.server.is_some()
    }

    /// The image as a source of the API; `None` where no server is named.
    pub fn source(&self, image: &str) -> Result<Option<Value>> {
        let Some(server) = &self.server else { return Ok(None) };
        let host = |rest: &str| rest.split('/').next().unwrap_or_default().to_owned();
        // Whatever it begins with: what is wrong of an address is printed.
        if host(server.split_once("://").map_or(server, |(_, rest)| rest)).contains('@') {
            // Other users of this host can read command lines.
            return Err(Error::Usage(
                "a password does not belong on a command line: karst image registry add HOST --user NAME"
                    .to_owned(),
            ));
        }
        if host(server.strip_prefix("https://").unwrap_or_default()).is_empty() {
            return Err(Error::Usage(format!(
                "\"{server}\" is no address of an image server: write https://HOST[:PORT][/PATH]"
            )));
        }
        let protocol = self.protocol.as_deref().unwrap_or("simplestreams");
        let mut source =
            json!({"type": "image", "mode": "pull", "server": server, "protocol": protocol, "alias": image});
        if let Some(file) = &self.server_certificate {
            source["certificate"] = json!(read_text(file)?);
        }
        Ok(Some(source))
    }
}

impl ImageCopy {
    /// Has the image fetched and prints its fingerprint.
    pub async fn run(self, context: &Context) -> Result<()> {
        let mut source = self.server.source(&self.image)?.ok_or_else(|| {
            Error::Usage("say which server has it: --server https://HOST (and --protocol)".to_owned())
        })?;
        if self.vm {
            source["image_type"] = json!("virtual-machine");
        }
        let aliases: Vec<Value> = self.alias.iter().map(|name| json!({"name": name})).collect();
        let body = json!({
            "source": source, "aliases": aliases, "public": self.public, "auto_update": self.auto_update,
        });
        let answer = context.client.post(&Url::new(&["images"]), &body).await?;
        let operation = context.finish(answer, format!("copying {}", self.image)).await?;
        match operation.as_ref().and_then(|o| o.metadata.get("fingerprint")?.as_str()) {
            Some(fingerprint) => output::line(fingerprint),
            None => Ok(()),
        }
    }
}

impl ImageRefresh {
    /// Looks for newer ones now, and says of each whether there was one.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        crate::client::operation::for_each(&self.images, |image| async move {
            let fingerprint = super::image::resolve(client, &image).await?;
            let url = Url::new(&["images", &fingerprint, "refresh"]);
            let answer = client
                .call(hyper::Method::POST, &url, hyper::HeaderMap::new(), crate::client::empty())
                .await?;
            let operation = context.finish(answer, format!("refreshing {image}")).await?;
            let new = operation.is_some_and(|operation| operation.metadata["refreshed"] == true);
            if context.quiet {
                return Ok(());
            }
            output::line(&format!("{image}: {}", if new { "a newer one was fetched" } else { "up to date" }))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        let of = |server: &str| Server { server: Some(server.to_owned()), ..Server::default() };
        assert_eq!(
            of("https://images.example").source("debian/12").unwrap(),
            Some(json!({"type": "image", "mode": "pull", "server": "https://images.example",
                "protocol": "simplestreams", "alias": "debian/12"}))
        );
        assert_eq!(Server::default().source("debian/12").unwrap(), None);
        for wrong in ["images.example", "http://images.example", "https://", "https:///x"] {
            assert_eq!(of(wrong).source("x").unwrap_err().exit_code(), 2, "{wrong}");
        }
        let error = of("https://me:sesame@r.example/v2").source("x").unwrap_err();
        assert!(error.to_string().contains("image registry add") && !error.to_string().contains("sesame"));
        // What comes behind is a path.
        assert!(of("https://r.example/a@b").source("x").is_ok());
    }
}
