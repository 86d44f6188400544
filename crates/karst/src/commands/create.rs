//! `launch` and `create`: one request, one operation.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::{completion::complete, image_server::Server, object::parse_pairs};
use crate::{
    client::{About, Kind, Url, url::last_segment},
    context::{Context, read_text},
    error::{Error, Result},
    output::{self, from_yaml},
};

/// Shortest text that is taken for a fingerprint (what `image list` shows).
const SHORT_FINGERPRINT: usize = 12;

/// Options of `launch` and `create`.
#[derive(Debug, clap::Args)]
pub struct Create {
    /// Alias or fingerprint of the image
    #[arg(required_unless_present = "empty", add = complete(Kind::Image))]
    image: Option<String>,
    /// Name of the new instance; the server chooses one otherwise
    name: Option<String>,
    #[command(flatten)]
    server: Server,
    /// A virtual machine instead of a container
    #[arg(long)]
    vm: bool,
    /// Without an image
    #[arg(long)]
    empty: bool,
    /// A configuration key (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE")]
    config: Vec<String>,
    /// A device: NAME,type=TYPE,KEY=VALUE...; keys of a device that a profile has are changed (repeatable)
    #[arg(short, long, value_name = "NAME,KEY=VALUE...")]
    device: Vec<String>,
    /// A profile (repeatable; default: default)
    #[arg(short, long, value_name = "NAME", add = complete(Kind::Profile))]
    profile: Vec<String>,
    /// No profile at all
    #[arg(long, conflicts_with = "profile")]
    no_profiles: bool,
    /// Network of its interface eth0
    #[arg(short, long, value_name = "NAME", add = complete(Kind::Network))]
    network: Option<String>,
    /// Storage pool of its root disk
    #[arg(short, long, value_name = "POOL", add = complete(Kind::Pool))]
    storage: Option<String>,
    /// Instance type: aws:t2.micro, c2-m4, ...
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    instance_type: Option<String>,
    /// Deleted when it stops
    #[arg(short, long)]
    ephemeral: bool,
    /// Description
    #[arg(long)]
    description: Option<String>,
    /// Host of a cluster to create it on
    #[arg(long, value_name = "HOST")]
    target: Option<String>,
    /// The number that clients of Proxmox know it by, from 100; the server gives the next one otherwise
    #[arg(long, value_name = "N")]
    vmid: Option<u32>,
    /// YAML with config, devices, profiles, description ("-" is stdin); options win over it
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Attach to the console once started (launch)
    #[arg(long)]
    console: bool,
}

impl Create {
    /// Creates the instance and, for `launch`, starts it in the same operation.
    pub async fn run(mut self, context: &Context, start: bool) -> Result<()> {
        if self.empty && self.image.is_some() && self.name.is_none() {
            self.name = self.image.take();
        }
        if self.empty && self.image.is_some() {
            return Err(Error::Usage("--empty takes a name but no image".to_owned()));
        }
        let body = self.body(context, start).await?;
        let mut url = Url::new(&["instances"]);
        if let Some(target) = &self.target {
            url = url.with("target", target);
        }
        let verb = if start { "launching" } else { "creating" };
        let label = format!("{verb} {}", self.name.as_deref().unwrap_or("instance"));
        let image = self.image.clone().unwrap_or_default();
        let work = async { context.finish(context.client.post(&url, &body).await?, label).await };
        let operation = work.await.about(&context.client, Kind::Image, &image)?;
        let name = match (&self.name, operation) {
            (Some(name), _) => name.clone(),
            (None, operation) => {
                let resource = operation
                    .as_ref()
                    .and_then(|o| o.resource("instances").or_else(|| o.resource("containers")));
                let name = resource
                    .map(last_segment)
                    .ok_or_else(|| Error::local("the server does not say the new name"))?;
                output::line(&name)?;
                name
            }
        };
        if start && self.console {
            return super::console::attach(context, &name, false).await;
        }
        Ok(())
    }

    /// The request.
    async fn body(&self, context: &Context, start: bool) -> Result<Value> {
        let mut body = match &self.file {
            None => Map::new(),
            Some(path) => match from_yaml(&read_text(path)?)? {
                Value::Object(object) => object,
                Value::Null => Map::new(),
                _ => return Err(Error::Usage(format!("{}: no YAML mapping", path.display()))),
            },
        };
        if let Some(name) = &self.name {
            body.insert("name".to_owned(), json!(name));
        }
        body.insert("type".to_owned(), json!(if self.vm { "virtual-machine" } else { "container" }));
        body.insert("source".to_owned(), self.source()?);
        if start {
            body.insert("start".to_owned(), json!(true));
        }
        if self.ephemeral {
            body.insert("ephemeral".to_owned(), json!(true));
        }
        if let Some(description) = &self.description {
            body.insert("description".to_owned(), json!(description));
        }
        if let Some(kind) = &self.instance_type {
            body.insert("instance_type".to_owned(), json!(kind));
        }
        if let Some(vmid) = self.vmid {
            body.insert("vmid".to_owned(), json!(vmid));
        }
        if self.no_profiles {
            body.insert("profiles".to_owned(), json!([]));
        } else if !self.profile.is_empty() {
            body.insert("profiles".to_owned(), json!(self.profile));
        }
        if !self.config.is_empty() {
            let config = object(&mut body, "config")?;
            for (key, value) in parse_pairs(&self.config)? {
                config.insert(key, json!(value));
            }
        }
        let mut devices = object(&mut body, "devices")?.clone();
        self.add_devices(context, &mut devices, &body).await?;
        body.insert("devices".to_owned(), Value::Object(devices));
        Ok(Value::Object(body))
    }

    /// Where its contents come from.
    fn source(&self) -> Result<Value> {
        let Some(image) = &self.image else {
            if self.server.is_named() {
                return Err(Error::Usage("--server has images, and --empty takes none".to_owned()));
            }
            return Ok(json!({"type": "none"}));
        };
        Ok(match self.server.source(image)? {
            Some(source) => source,
            None if is_fingerprint(image) => json!({"type": "image", "fingerprint": image}),
            None => json!({"type": "image", "alias": image}),
        })
    }

    /// `--network`, `--storage` and `--device`; the profiles are only fetched where a device of theirs may be meant.
    async fn add_devices(
        &self,
        context: &Context,
        devices: &mut Map<String, Value>,
        body: &Map<String, Value>,
    ) -> Result<()> {
        if let Some(network) = &self.network {
            devices.insert("eth0".to_owned(), json!({"type": "nic", "name": "eth0", "network": network}));
        }
        let overrides = self.device.iter().map(|text| parse_device(text)).collect::<Result<Vec<_>>>()?;
        let needs_profiles = self.storage.is_some()
            || overrides.iter().any(|(name, keys)| {
                !devices.contains_key(name) && !keys.iter().any(|(key, _)| key == "type")
            });
        let inherited = if needs_profiles { self.profile_devices(context, body).await? } else { Map::new() };
        if let Some(pool) = &self.storage {
            let root = inherited.iter().find(|(_, device)| {
                device.get("type") == Some(&json!("disk")) && device.get("path") == Some(&json!("/"))
            });
            let (name, mut device) = root.map_or_else(
                || ("root".to_owned(), json!({"type": "disk", "path": "/"})),
                |(name, device)| (name.clone(), device.clone()),
            );
            device["pool"] = json!(pool);
            devices.insert(name, device);
        }
        for (name, keys) in overrides {
            let mut device =
                devices.get(&name).or_else(|| inherited.get(&name)).cloned().unwrap_or_else(|| json!({}));
            if !device.is_object() {
                return Err(Error::Usage(format!("device \"{name}\" is no mapping")));
            }
            for (key, value) in keys {
                device[key] = json!(value);
            }
            if device.get("type").is_none() {
                return Err(Error::Usage(format!(
                    "no profile has a device \"{name}\": a new one needs type=..."
                )));
            }
            devices.insert(name, device);
        }
        Ok(())
    }

    /// The devices of the profiles that the instance will have, the later winning.
    async fn profile_devices(
        &self,
        context: &Context,
        body: &Map<String, Value>,
    ) -> Result<Map<String, Value>> {
        let names: Vec<String> = match body.get("profiles").and_then(Value::as_array) {
            Some(names) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            None => vec!["default".to_owned()],
        };
        let profiles = names.iter().map(|name| async move {
            let answer = context.client.get(&Url::new(&["profiles", name])).await;
            answer.about(&context.client, Kind::Profile, name)
        });
        let mut devices = Map::new();
        for profile in futures::future::try_join_all(profiles).await? {
            devices.extend(
                profile.metadata.get("devices").and_then(Value::as_object).cloned().unwrap_or_default(),
            );
        }
        Ok(devices)
    }
}

/// The object under `key`, made if missing.
fn object<'a>(body: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Map<String, Value>> {
    let value = body.entry(key).or_insert_with(|| json!({}));
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut().ok_or_else(|| Error::Usage(format!("\"{key}\" is no mapping")))
}

/// Whether a text can only be a fingerprint or its beginning.
pub fn is_fingerprint(text: &str) -> bool {
    text.len() >= SHORT_FINGERPRINT
        && text.len() <= 64
        && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// `NAME,KEY=VALUE,...`; a comma inside a value is not possible, as with Incus.
fn parse_device(text: &str) -> Result<(String, Vec<(String, String)>)> {
    let (name, rest) = text
        .split_once(',')
        .ok_or_else(|| Error::Usage(format!("\"{text}\" is no device: write NAME,KEY=VALUE,...")))?;
    let words: Vec<String> = rest.split(',').map(str::to_owned).collect();
    Ok((name.to_owned(), parse_pairs(&words)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints() {
        assert!(is_fingerprint("f6452920a30d"));
        assert!(!is_fingerprint("f6452920a30"), "too short");
        assert!(!is_fingerprint("debian-12-abcdef"));
    }

    #[test]
    fn devices() {
        let (name, keys) = parse_device("root,size=10GiB,io.cache=none").unwrap();
        assert_eq!(name, "root");
        assert_eq!(
            keys,
            [("size".to_owned(), "10GiB".to_owned()), ("io.cache".to_owned(), "none".to_owned())]
        );
        assert_eq!(parse_device("root").unwrap_err().exit_code(), 2);
        assert_eq!(parse_device("root,size").unwrap_err().exit_code(), 2);
    }
}
