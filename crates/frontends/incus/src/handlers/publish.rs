//! `POST /1.0/images` with a JSON body: images that are made of something that is there; and rebuilding, the way back.

use super::snapshots::time;
use crate::{
    app::{Call, Taken, running},
    fields::Fields,
    respond::{Reply, accepted},
    wire::operation::OperationView,
};
use karst_engine::{
    compute::create::InstanceSource,
    images::{
        ImageOptions,
        publish::PublishImage,
        remote::{FetchImage, Login, RemoteSource, protocol},
    },
    secrets::SecretValue,
};
use karst_model::{Error, Result, backup::Compression, image::UpdateSource, instance::InstanceKind};
use percent_encoding::percent_decode_str;
use serde_json::Value;

/// Aliases of a body: a list of `{name, description}`.
///
/// # Errors
/// Invalid by field.
pub(super) fn aliases(f: &mut Fields) -> Result<Vec<(String, String)>> {
    let Some(value) = f.take("aliases") else { return Ok(vec![]) };
    let Value::Array(list) = value else {
        return Err(Error::invalid("aliases", "aliases must be a list"));
    };
    let mut found = vec![];
    for (n, one) in list.into_iter().enumerate() {
        let mut one = Fields::of(one, &format!("aliases[{n}]"))?;
        let alias = (one.need_text("name")?, one.text("description")?.unwrap_or_default());
        one.finish(&["type"])?;
        found.push(alias);
    }
    Ok(found)
}

/// What a body says of the image to be.
///
/// # Errors
/// Invalid by field.
pub(super) fn options(f: &mut Fields) -> Result<ImageOptions> {
    Ok(ImageOptions {
        filename: f.text("filename")?.unwrap_or_default(),
        public: f.flag("public")?,
        properties: f.config("properties")?.unwrap_or_default(),
        aliases: aliases(f)?,
        expires_at: time(f, "expires_at")?.flatten(),
        profiles: f.texts("profiles")?.filter(|p| !p.is_empty()),
        ..Default::default()
    })
}

/// The server that a source names.
///
/// # Errors
/// Invalid by field.
pub(super) fn remote(source: &mut Fields) -> Result<RemoteSource> {
    if let Some(mode) = source.text("mode")?.filter(|m| !matches!(m.as_str(), "" | "pull")) {
        let text = format!("images are pulled from their server; {mode:?} is not there yet");
        return Err(Error::unsupported(text).at("source.mode"));
    }
    let text = |t: Option<String>| t.filter(|t| !t.is_empty());
    let fingerprint = text(source.text("fingerprint")?);
    let alias = text(source.text("alias")?);
    let kind = text(source.text("image_type")?).map(|k| InstanceKind::parse("source.image_type", &k));
    let (server, login) = apart(source.text("server")?.unwrap_or_default())?;
    let from = UpdateSource {
        server,
        protocol: protocol(&source.text("protocol")?.unwrap_or_default())?,
        certificate: text(source.text("certificate")?),
        alias: None,
        kind: kind.transpose()?,
    };
    Ok(RemoteSource {
        from,
        // Clients put an alias there when they did not look what it names.
        reference: fingerprint.or(alias).unwrap_or_default(),
        secret: text(source.text("secret")?),
        project: text(source.text("project")?),
        login,
    })
}

/// An address without the name and the password that it may hold, and those: `https://NAME:PASSWORD@HOST`, as clients of Incus
/// say who they are at a registry.
fn apart(address: String) -> Result<(String, Option<Login>)> {
    let Some(rest) = address.strip_prefix("https://") else { return Ok((address, None)) };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let Some((who, place)) = authority.rsplit_once('@') else { return Ok((address, None)) };
    // The error says nothing of what it is about.
    let wrong = |text: &str| Error::invalid("source.server", text);
    let (user, password) = who
        .split_once(':')
        .ok_or_else(|| wrong("there is a name without a password in the address of the registry"))?;
    let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(String::from);
    let user = decoded(user).map_err(|_| wrong("the name in the address of the registry is not UTF-8"))?;
    let password = SecretValue::new(percent_decode_str(password).collect())?;
    Ok((format!("https://{place}{path}"), Some(Login { user, password })))
}

async fn fetch(call: &Taken, mut f: Fields, mut source: Fields) -> Result<Reply> {
    let remote = remote(&mut source)?;
    source.finish(&["name", "url"])?;
    let request =
        FetchImage { source: remote, options: options(&mut f)?, auto_update: f.flag("auto_update")? };
    f.finish(&["compression_algorithm", "format"])?;
    running(&call.engine().image_fetch(&call.context, call.project(), request).await?)
}

/// An image that another server is to bring: the answer has a secret for it.
fn awaited(call: &Taken, mut f: Fields, mut source: Fields) -> Result<Reply> {
    let fingerprint = source.need_text("fingerprint")?;
    for name in ["server", "alias", "name", "secret", "certificate", "url", "project"] {
        if source.text(name)?.is_some_and(|t| !t.is_empty()) {
            let text =
                format!("an image that is pushed comes by its fingerprint alone; leave source.{name} out");
            return Err(Error::invalid(format!("source.{name}"), text));
        }
    }
    source.finish(&["image_type", "mode", "protocol", "type"])?;
    let options = options(&mut f)?;
    if f.flag("auto_update")? {
        let text = "an image that is pushed follows no server; leave auto_update out";
        return Err(Error::invalid("auto_update", text));
    }
    f.finish(&["compression_algorithm", "format"])?;
    let (operation, secret) =
        call.engine().image_await(&call.context, call.project(), &fingerprint, options)?;
    let record = operation.snapshot();
    let mut metadata = record.metadata.clone();
    metadata.insert("secret".into(), secret.into());
    accepted(&record.id.to_string(), &OperationView::of(&record).with_metadata(&metadata))
}

/// `POST /1.0/images` with a JSON body.
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn from_source(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let pushed = f.is("source", "mode", "push");
    let mut source = f.object("source")?;
    if pushed {
        return awaited(&call, f, source);
    }
    let kind = source.need_text("type")?;
    match kind.as_str() {
        "image" => return fetch(&call, f, source).await,
        "instance" | "container" | "virtual-machine" | "snapshot" => {}
        other => {
            return Err(Error::unsupported(format!(
                "images cannot be made from {other:?} yet; upload one, or build one"
            ))
            .at("source.type"));
        }
    }
    let full = source.need_text("name")?;
    let (name, snapshot) = match (kind.as_str(), full.split_once('/')) {
        ("snapshot", Some((name, snapshot))) => (name.to_owned(), Some(snapshot.to_owned())),
        ("snapshot", None) => {
            let text = format!("{full:?} is not a snapshot; name it as INSTANCE/SNAPSHOT");
            return Err(Error::invalid("source.name", text));
        }
        _ => (full, None),
    };
    let project = source.text("project")?;
    source.finish(&[
        "alias",
        "certificate",
        "fingerprint",
        "image_type",
        "mode",
        "protocol",
        "secret",
        "server",
        "url",
    ])?;
    let options = options(&mut f)?;
    if f.flag("auto_update")? {
        let text = "an image of an instance follows no server; leave auto_update out";
        return Err(Error::invalid("auto_update", text));
    }
    let compression = match f.text("compression_algorithm")?.filter(|c| !c.is_empty()) {
        Some(name) => Some(Compression::parse("compression_algorithm", &name)?),
        None => None,
    };
    if f.text("format")?.is_some_and(|t| !matches!(t.as_str(), "" | "unified")) {
        let text = "an image of an instance is made as one file; leave the format out";
        return Err(Error::unsupported(text).at("format"));
    }
    f.finish(&[])?;
    let request = PublishImage { project, name, snapshot, compression, options };
    running(&call.engine().image_publish(&call.context, call.project(), request).await?)
}

/// `POST /1.0/instances/{name}/rebuild`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn rebuild(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let source = super::instances::source(&mut f, &call)?;
    f.finish(&[])?;
    if let InstanceSource::Image(reference) | InstanceSource::ImageOf { reference, .. } = &source
        && reference.is_empty()
    {
        return Err(Error::invalid("source.alias", "the image is missing"));
    }
    let operation =
        call.engine().instance_rebuild(&call.context, call.project(), call.param(0), source).await?;
    running(&operation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_passwords_are_taken_out_of_addresses() {
        let of = |address: &str| apart(address.to_owned());
        let login = |user: &str, password: &str| {
            let password = SecretValue::new(password.as_bytes().to_vec()).unwrap();
            Some(Login { user: user.to_owned(), password })
        };
        for (address, server, wanted) in [
            ("https://a.example/x", "https://a.example/x", None),
            ("https://a.example/x@y", "https://a.example/x@y", None),
            ("https://me:sesame@a.example:5000", "https://a.example:5000", login("me", "sesame")),
            ("https://a%40b:se%3Aame%2F@a.example/v", "https://a.example/v", login("a@b", "se:ame/")),
            ("https://me:se@same@a.example", "https://a.example", login("me", "se@same")),
            ("http://me:sesame@a.example", "http://me:sesame@a.example", None),
        ] {
            assert_eq!(of(address).unwrap(), (server.to_owned(), wanted), "{address}");
        }
        let e = of("https://sesame@a.example").unwrap_err();
        assert!(!e.message.contains("sesame"), "{e}");
    }
}
