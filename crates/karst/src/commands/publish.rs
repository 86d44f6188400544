//! `publish`, an image of an instance, and `rebuild`, the way back.

use serde_json::{Value, json};

use super::{completion::complete, create::is_fingerprint, expiry, object::config_object};
use crate::{
    client::{About, Instance, Kind, Url},
    context::Context,
    error::{Error, Result},
    output,
};

/// Options of `publish`.
#[derive(Debug, clap::Args)]
pub struct Publish {
    /// Instance, or INSTANCE/SNAPSHOT
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// Properties of the image, such as description="with nginx"
    #[arg(value_name = "KEY=VALUE")]
    properties: Vec<String>,
    /// An alias (repeatable)
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,
    /// For everyone, also without a certificate
    #[arg(long)]
    public: bool,
    /// Compression: gzip, zstd, xz, bzip2 or none (default: what the server's images.compression_algorithm says)
    #[arg(long, value_name = "NAME", value_parser = ["gzip", "zstd", "xz", "bzip2", "none"])]
    compression: Option<String>,
    /// Until when you vouch for it: a time (RFC 3339), a span such as 12h or 7d, or never; told, nothing deletes it then
    #[arg(long, value_name = "WHEN", value_parser = expiry::parse)]
    expires: Option<String>,
}

/// Options of `rebuild`.
#[derive(Debug, clap::Args)]
pub struct Rebuild {
    /// Alias or fingerprint of the image
    #[arg(required_unless_present = "empty", add = complete(Kind::Image))]
    image: Option<String>,
    /// Instance
    #[arg(required_unless_present = "empty", add = complete(Kind::Instance))]
    instance: Option<String>,
    /// With nothing on its disk instead of an image
    #[arg(long)]
    empty: bool,
    /// Stop it first if it runs, without asking the guest, and start it again afterwards
    #[arg(short, long)]
    force: bool,
}

impl Publish {
    /// Makes the image and prints its fingerprint.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let body = self.body()?;
        let work = async {
            let answer = client.post(&Url::new(&["images"]), &body).await?;
            context.finish(answer, format!("publishing {}", self.instance)).await
        };
        let operation = work.await.about(client, Kind::Instance, &self.instance)?;
        let fingerprint = operation.as_ref().and_then(|o| o.metadata.get("fingerprint")?.as_str());
        match fingerprint {
            Some(fingerprint) => output::line(fingerprint),
            None => Err(Error::local("the server does not say the fingerprint")),
        }
    }

    /// The request.
    fn body(&self) -> Result<Value> {
        let kind = if self.instance.contains('/') { "snapshot" } else { "instance" };
        let aliases: Vec<Value> = self.alias.iter().map(|name| json!({"name": name})).collect();
        let mut body = json!({
            "source": {"type": kind, "name": self.instance},
            "public": self.public,
            "properties": config_object(&self.properties)?,
            "aliases": aliases,
        });
        if let Some(compression) = &self.compression {
            body["compression_algorithm"] = json!(compression);
        }
        if let Some(expires) = &self.expires {
            body["expires_at"] = json!(expires);
        }
        Ok(body)
    }
}

impl Rebuild {
    /// What it is made of, and the instance.
    fn parts(self) -> Result<(Value, String, String)> {
        match (self.empty, self.image, self.instance) {
            // The first word is the instance then.
            (true, Some(instance), None) => Ok((json!({"type": "none"}), instance, String::new())),
            (true, Some(_), Some(_)) => {
                Err(Error::Usage("--empty takes an instance but no image".to_owned()))
            }
            (false, Some(image), Some(instance)) => {
                let field = if is_fingerprint(&image) { "fingerprint" } else { "alias" };
                let mut source = json!({"type": "image"});
                source[field] = json!(image);
                Ok((source, instance, image))
            }
            _ => Err(Error::Usage(
                "say which instance: karst rebuild IMAGE INSTANCE, or karst rebuild --empty INSTANCE"
                    .to_owned(),
            )),
        }
    }

    /// Lets the instance begin anew.
    pub async fn run(self, context: &Context) -> Result<()> {
        let (client, force) = (&context.client, self.force);
        let (source, instance, image) = self.parts()?;
        let read = client.get_as::<Instance>(&Url::new(&["instances", &instance])).await;
        let now = read.about(client, Kind::Instance, &instance)?;
        let runs = force && now.status != "Stopped";
        if runs && now.ephemeral {
            let text = format!("{instance} is ephemeral and is deleted when it stops; copy it first");
            return Err(Error::Usage(text));
        }
        if runs && !image.is_empty() {
            // A name that is not there stops nothing.
            let fingerprint = super::image::resolve(client, &image).await?;
            let found = client.get(&Url::new(&["images", &fingerprint])).await;
            found.about(client, Kind::Image, &image)?;
        }
        let state = async |action: &str, doing: &str| {
            let body = json!({"action": action, "force": true, "timeout": -1});
            let url = Url::new(&["instances", &instance, "state"]);
            let answer = client.change(hyper::Method::PUT, &url, &body, None).await?;
            context.finish(answer, format!("{doing} {instance}")).await.map(drop)
        };
        if runs {
            state("stop", "stopping").await?;
        }
        let work = async {
            let url = Url::new(&["instances", &instance, "rebuild"]);
            let answer = client.post(&url, &json!({"source": source})).await?;
            context.finish(answer, format!("rebuilding {instance}")).await.map(drop)
        };
        let done = work.await.about(client, Kind::Image, &image).about(client, Kind::Instance, &instance);
        // As it was, also where it could not be rebuilt.
        let started = if runs { state("start", "starting").await } else { Ok(()) };
        if let (Err(_), Err(error)) = (&done, &started) {
            // Both are to be known: it was not rebuilt, and it stands still.
            crate::error::report(error);
        }
        done.and(started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(instance: &str) -> Publish {
        Publish {
            instance: instance.to_owned(),
            properties: vec!["description=with nginx".to_owned()],
            alias: vec!["mine".to_owned()],
            public: false,
            compression: Some("zstd".to_owned()),
            expires: None,
        }
    }

    #[test]
    fn images_of_instances_and_snapshots() {
        assert_eq!(
            publish("c1/s1").body().unwrap(),
            json!({"source": {"type": "snapshot", "name": "c1/s1"}, "public": false,
                "properties": {"description": "with nginx"}, "aliases": [{"name": "mine"}],
                "compression_algorithm": "zstd"})
        );
        assert_eq!(publish("c1").body().unwrap()["source"]["type"], "instance");
    }

    #[test]
    fn what_instances_are_rebuilt_of() {
        let rebuild = |image: Option<&str>, instance: Option<&str>, empty| {
            let own = |text: Option<&str>| text.map(str::to_owned);
            Rebuild { image: own(image), instance: own(instance), empty, force: false }.parts()
        };
        let (source, instance, _) = rebuild(Some("debian/12"), Some("c1"), false).unwrap();
        assert_eq!((source, instance.as_str()), (json!({"type": "image", "alias": "debian/12"}), "c1"));
        let (source, _, _) = rebuild(Some("f6452920a30d"), Some("c1"), false).unwrap();
        assert_eq!(source, json!({"type": "image", "fingerprint": "f6452920a30d"}));
        let (source, instance, _) = rebuild(Some("c1"), None, true).unwrap();
        assert_eq!((source, instance.as_str()), (json!({"type": "none"}), "c1"));
        assert_eq!(rebuild(Some("debian/12"), Some("c1"), true).unwrap_err().exit_code(), 2);
        assert_eq!(rebuild(None, None, true).unwrap_err().exit_code(), 2);
    }
}
