//! `disk`: layers of disks of virtual machines.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::completion::complete;
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::Result,
    output,
};

/// Commands of `disk`.
#[derive(Debug, clap::Subcommand)]
pub enum Disk {
    /// List the layers of the disks of a virtual machine
    #[command(visible_alias = "ls")]
    Layers(Layers),
    /// Let disks go on in new layers; what they were lies below
    Layer(Layer),
    /// Put layers into what lies below them
    Commit(Commit),
    /// Put what lies below the active layer into it
    Pull(Pull),
}

/// Options of `disk layers`.
#[derive(Debug, clap::Args)]
pub struct Layers {
    /// Virtual machine
    #[arg(add = complete(Kind::Instance))]
    instance: String,
}

/// Options of `disk layer`.
#[derive(Debug, clap::Args)]
pub struct Layer {
    /// Virtual machine
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// Device of the disk; all disks without
    device: Option<String>,
    /// Name of the layer
    #[arg(long, requires = "device")]
    name: Option<String>,
    /// Keep a record of the moment as a snapshot of this name
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Make the file systems inside still before
    #[arg(long)]
    quiesce: bool,
}

/// Options of `disk commit`.
#[derive(Debug, clap::Args)]
pub struct Commit {
    /// Virtual machine
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// Device of the disk; the root without
    device: Option<String>,
    /// Highest layer that goes; the active one without
    #[arg(long, value_name = "LAYER")]
    top: Option<String>,
    /// Layer that gets what is in them; the lowest file without
    #[arg(long, value_name = "LAYER")]
    base: Option<String>,
}

/// Options of `disk pull`.
#[derive(Debug, clap::Args)]
pub struct Pull {
    /// Virtual machine
    #[arg(add = complete(Kind::Instance))]
    instance: String,
    /// Device of the disk; the root without
    device: Option<String>,
    /// Highest layer that stays below; nothing stays without, not even the image
    #[arg(long, value_name = "LAYER")]
    base: Option<String>,
}

/// A disk as the server tells of it.
#[derive(Debug, Deserialize)]
struct Shown {
    device: String,
    pool: String,
    volume: String,
    layers: Vec<ShownLayer>,
}

#[derive(Debug, Deserialize)]
struct ShownLayer {
    name: String,
    created_at: String,
}

fn url(instance: &str) -> Url {
    Url::new(&["karst", "instances", instance, "layers"])
}

/// What was said of these.
fn said(all: &[(&str, &Option<String>)]) -> Map<String, Value> {
    let some = |(name, value): &(&str, &Option<String>)| Some(((*name).to_owned(), json!(value.as_ref()?)));
    all.iter().filter_map(some).collect()
}

async fn work(
    context: &Context,
    instance: &str,
    at: Url,
    body: Map<String, Value>,
    label: &str,
) -> Result<()> {
    let client = &context.client;
    let work = async {
        let answer = client.post(&at, &Value::Object(body)).await?;
        context.finish(answer, format!("{label} {instance}")).await
    };
    work.await.about(client, Kind::Instance, instance).map(drop)
}

impl Disk {
    /// Does it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Layers(command) => command.run(context).await,
            Self::Layer(Layer { instance, device, name, snapshot, quiesce }) => {
                let mut body = said(&[("device", &device), ("name", &name), ("snapshot", &snapshot)]);
                body.insert("quiesce".into(), quiesce.into());
                work(context, &instance, url(&instance), body, "adding layers to disks of").await
            }
            Self::Commit(Commit { instance, device, top, base }) => {
                let body = said(&[("device", &device), ("top", &top), ("base", &base)]);
                let at = Url::new(&["karst", "instances", instance.as_str(), "layers", "commit"]);
                work(context, &instance, at, body, "committing layers of").await
            }
            Self::Pull(Pull { instance, device, base }) => {
                let body = said(&[("device", &device), ("base", &base)]);
                let at = Url::new(&["karst", "instances", instance.as_str(), "layers", "pull"]);
                work(context, &instance, at, body, "pulling layers of").await
            }
        }
    }
}

impl Layers {
    async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let disks: Vec<Shown> =
            client.get_as(&url(&self.instance)).await.about(client, Kind::Instance, &self.instance)?;
        output::write(text(&disks).as_bytes())
    }
}

/// A line of each file, the active one first.
fn text(disks: &[Shown]) -> String {
    let mut text = String::new();
    for disk in disks {
        text.push_str(&format!("{} (pool {})\n", disk.device, disk.pool));
        for layer in disk.layers.iter().rev() {
            text.push_str(&format!("  {}  {}\n", layer.name, layer.created_at));
        }
        text.push_str(&format!("  {}\n", disk.volume));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_shown_from_the_active_one_down() {
        let layer = |name: &str| ShownLayer { name: name.into(), created_at: "T".into() };
        let disk = Shown {
            device: "root".into(),
            pool: "default".into(),
            volume: "v1".into(),
            layers: vec![layer("a"), layer("b")],
        };
        assert_eq!(text(&[disk]), "root (pool default)\n  b  T\n  a  T\n  v1\n");
        let body = said(&[("device", &Some("root".into())), ("top", &None)]);
        assert_eq!(Value::Object(body), json!({"device": "root"}));
    }
}
