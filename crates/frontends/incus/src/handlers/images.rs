//! `/1.0/images`: lists, uploads, export, aliases.

use super::list as respond_list;
use crate::{
    app::{Call, running},
    filter::Filter,
    image_files::content,
    multipart::{Multipart, boundary},
    request::{self, Query},
    respond::{Etag, Reply, accepted, created, empty, sync_etag},
    stream::Stream,
    wire::{
        self,
        image::{AliasView, ImageView},
        operation::OperationView,
    },
};
use http_body_util::BodyExt;
use hyper::{
    Response,
    header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue},
};
use karst_engine::images::ImagePart;
use karst_engine::{
    Context, LiveOperation, Row,
    images::{
        ImageOptions, ImageUpload, PartUpload, UpdateImage,
        push::{Admitted, PushImage},
    },
};
use karst_model::{
    Error, ErrorKind, Result,
    image::{DiskFormat, Image, ImageAlias},
    instance::InstanceKind,
};
use tokio::io::AsyncWriteExt;

const VIEW: &str = "image";
const ALIAS_VIEW: &str = "image-alias";

fn project_name(call: &Call, id: karst_model::ProjectId) -> String {
    call.engine().inner().project_name(Some(id))
}

/// `GET /1.0/images`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let projects: Vec<String> = if call.query.flag("all-projects") {
        call.engine().projects(&call.context).iter().map(|p| p.name.to_string()).collect()
    } else {
        vec![call.project().to_owned()]
    };
    let mut found: Vec<(Row<Image>, Vec<Row<ImageAlias>>, String)> = vec![];
    for project in projects {
        let aliases = call.engine().image_aliases_shown(&call.context, &project, None)?;
        for image in call.engine().images_shown(&call.context, &project)? {
            let own = aliases.iter().filter(|a| a.image == image.id).cloned().collect();
            found.push((image, own, project.clone()));
        }
    }
    respond_list(
        recursion,
        &filter,
        found.iter().map(|(image, aliases, project)| {
            let view = ImageView::of(image, aliases.iter().map(|a| -> &ImageAlias { a }), project);
            (view, wire::path("images", &image.fingerprint, project))
        }),
    )
}

/// `GET /1.0/images/{fingerprint}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let secret = call.query.get("secret").filter(|s| !s.is_empty());
    let image = call.engine().image_shown(&call.context, call.project(), call.param(0), secret)?;
    let image = of_fingerprint(call.param(0), image)?;
    let aliases = call.engine().image_aliases_shown(&call.context, call.project(), Some(image.id))?;
    let project = project_name(&call, image.project);
    let view = ImageView::of(&image, aliases.iter().map(|a| -> &ImageAlias { a }), &project);
    sync_etag(&view, &Etag::of(VIEW, image.id.uuid(), image.spec_version))
}

/// This path takes fingerprints and beginnings of them; aliases have their own.
fn by_fingerprint(call: &Call) -> Result<Row<Image>> {
    let reference = call.param(0);
    of_fingerprint(reference, call.engine().image(&call.context, call.project(), reference)?)
}

fn of_fingerprint(reference: &str, image: Row<Image>) -> Result<Row<Image>> {
    if !image.fingerprint.starts_with(&reference.to_ascii_lowercase()) {
        return Err(Error::not_found(format!("image {reference:?} not found")));
    }
    Ok(image)
}

fn update(mut f: crate::fields::Fields, old: Option<&Image>, if_version: Option<u64>) -> Result<UpdateImage> {
    let public = match old {
        Some(old) if !f.has("public") => {
            f.take("public");
            old.public
        }
        _ => f.flag("public")?,
    };
    let mut properties = old.map(|o| o.properties.clone()).unwrap_or_default();
    properties.extend(f.config("properties")?.unwrap_or_default());
    properties.retain(|_, v| !v.is_empty());
    let profiles =
        f.texts("profiles")?.unwrap_or_else(|| old.map(|o| o.profiles.clone()).unwrap_or_default());
    let auto_update = f.has("auto_update").then(|| f.flag("auto_update")).transpose()?;
    f.take("auto_update");
    let expires_at = super::snapshots::time(&mut f, "expires_at")?;
    f.finish(&[
        "aliases",
        "architecture",
        "cached",
        "filename",
        "fingerprint",
        "size",
        "type",
        "created_at",
        "last_used_at",
        "uploaded_at",
        "project",
        "update_source",
    ])?;
    Ok(UpdateImage { public, properties, profiles, auto_update, expires_at, if_version })
}

/// `PUT /1.0/images/{fingerprint}`
///
/// # Errors
/// Those of the engine.
pub async fn replace(call: Call) -> Result<Reply> {
    let image = by_fingerprint(&call)?;
    let if_version = call.expected(VIEW, image.id.uuid(), image.spec_version)?;
    let (call, f) = call.fields().await?;
    let request = update(f, None, if_version)?;
    call.engine().image_update(&call.context, call.project(), call.param(0), request).await?;
    Ok(empty())
}

/// `PATCH /1.0/images/{fingerprint}`
///
/// # Errors
/// Those of the engine.
pub async fn patch(call: Call) -> Result<Reply> {
    let image = by_fingerprint(&call)?;
    let if_version = call.expected(VIEW, image.id.uuid(), image.spec_version)?;
    let (call, f) = call.fields().await?;
    let request = update(f, Some(&image), if_version.or(Some(image.spec_version)))?;
    call.engine().image_update(&call.context, call.project(), call.param(0), request).await?;
    Ok(empty())
}

/// `DELETE /1.0/images/{fingerprint}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    by_fingerprint(&call)?;
    match call.engine().image_delete(&call.context, call.project(), call.param(0)).await {
        Ok(operation) => running(&operation),
        // Whoever deletes what is being deleted already gets what he asked for.
        Err(e) if e.is(ErrorKind::Conflict) => {
            let operations = &call.engine().inner().operations;
            let path = format!("/1.0/images/{}", call.param(0));
            let same = operations.running().into_iter().find(|o| {
                o.description == "Deleting image" && o.resources.values().flatten().any(|r| *r == path)
            });
            match same.and_then(|o| operations.live(o.id)) {
                Some(operation) => running(&operation),
                None => Err(e),
            }
        }
        Err(e) => Err(e),
    }
}

/// `GET /1.0/images/{fingerprint}/export`: one file, or a multipart body of two.
///
/// # Errors
/// Those of the engine.
pub async fn export(call: Call) -> Result<Reply> {
    let secret = call.query.get("secret").filter(|s| !s.is_empty());
    let (image, answer) =
        call.engine().image_shown_export(&call.context, call.project(), call.param(0), secret).await?;
    let image = of_fingerprint(call.param(0), image)?;
    let files = answer.value.into_iter().zip(answer.fds).collect();
    let fingerprint = &image.fingerprint;
    let content = content(files)?;
    let mut reply: Reply = Response::new(content.body);
    let headers = reply.headers_mut();
    if let Ok(v) = HeaderValue::from_str(&content.content_type) {
        headers.insert(CONTENT_TYPE, v);
    }
    if let Some((size, filename)) = content.single {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
        if let Ok(v) = HeaderValue::from_str(&format!("inline;filename={filename}")) {
            headers.insert(CONTENT_DISPOSITION, v);
        }
    }
    reply.headers_mut().insert(HeaderName::from_static("x-incus-type"), HeaderValue::from_static("incus"));
    tracing::debug!(%fingerprint, "an image is exported");
    Ok(reply)
}

/// `POST /1.0/images/{fingerprint}/secret`
///
/// # Errors
/// Those of the engine.
pub async fn secret(call: Call) -> Result<Reply> {
    by_fingerprint(&call)?;
    let call = call.bodiless().await?;
    let (operation, secret) = call.engine().image_secret(&call.context, call.project(), call.param(0))?;
    let record = operation.snapshot();
    let mut metadata = record.metadata.clone();
    metadata.insert("secret".into(), secret.into());
    accepted(&record.id.to_string(), &OperationView::of(&record).with_metadata(&metadata))
}

/// `POST /1.0/images/{fingerprint}/export`: pushes it to another server, where a secret was made for it.
///
/// # Errors
/// Those of the engine.
pub async fn push(call: Call) -> Result<Reply> {
    by_fingerprint(&call)?;
    let (call, mut f) = call.fields().await?;
    let request = PushImage {
        server: f.need_text("target")?,
        certificate: f.text("certificate")?,
        secret: f.need_text("secret")?,
        project: f.text("project")?,
        profiles: f.texts("profiles")?.filter(|p| !p.is_empty()),
    };
    // What it is called there is said where the secret was made, as with Incus; clients name all aliases that it has here.
    super::publish::aliases(&mut f)?;
    f.finish(&[])?;
    running(&call.engine().image_push(&call.context, call.project(), call.param(0), request).await?)
}

/// `POST /1.0/images/{fingerprint}/refresh`
///
/// # Errors
/// Those of the engine.
pub async fn refresh(call: Call) -> Result<Reply> {
    by_fingerprint(&call)?;
    let call = call.bodiless().await?;
    running(&call.engine().image_refresh(&call.context, call.project(), call.param(0)).await?)
}

fn aliases_of(text: &str) -> Result<Vec<(String, String)>> {
    // X-Incus-Aliases is a query: `alias=a&alias=b`, or names as keys.
    let query = Query::parse(Some(text))?;
    Ok(query.pairs().map(|(k, v)| (if k == "alias" { v } else { k }.to_owned(), String::new())).collect())
}

/// `POST /1.0/images`: upload of one file, or of metadata and root in a multipart body.
///
/// # Errors
/// Those of the engine; malformed bodies.
pub async fn upload(call: Call) -> Result<Reply> {
    let content_type = call.header(CONTENT_TYPE.as_str()).unwrap_or("application/octet-stream").to_owned();
    if content_type.starts_with("application/json") {
        return super::publish::from_source(call).await;
    }
    let mut options = ImageOptions {
        fingerprint: call.incus_header("fingerprint").filter(|f| !f.is_empty()).map(str::to_owned),
        filename: call.incus_header("filename").unwrap_or_default().to_owned(),
        public: matches!(call.incus_header("public"), Some("1" | "true")),
        ..Default::default()
    };
    if let Some(text) = call.incus_header("properties") {
        options.properties =
            Query::parse(Some(text))?.pairs().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    }
    if let Some(text) = call.incus_header("aliases") {
        options.aliases = aliases_of(text)?;
    }
    let profiles = call.incus_header("profiles").filter(|p| !p.is_empty()).map(aliases_of).transpose()?;
    let secret = call.incus_header("secret").filter(|s| !s.is_empty()).map(str::to_owned);
    if let Some(secret) = secret {
        let fingerprint = options.fingerprint.clone().unwrap_or_default();
        let mut admitted = call.engine().image_admit(call.project(), &fingerprint, &secret)?;
        if admitted.options.filename.is_empty() {
            admitted.options.filename = options.filename;
        }
        // Those are the one thing that Incus lets the server say that brings it.
        let said = profiles.map(|all| all.into_iter().map(|(name, _)| name).collect());
        admitted.options.profiles = admitted.options.profiles.or(said);
        return pushed(call, &content_type, admitted).await;
    }
    if profiles.is_some() {
        return Err(
            Error::unsupported("profiles of an image are set after its upload").at("X-Incus-profiles")
        );
    }
    options.disk = call
        .header("x-karst-disk-format")
        .map(|f| DiskFormat::parse("X-Karst-disk-format", f))
        .transpose()?;
    if options.disk.is_some() && content_type.starts_with("multipart/form-data") {
        let text = "a disk by itself is the whole body; leave X-Karst-disk-format out";
        return Err(Error::invalid("X-Karst-disk-format", text));
    }
    let context = call.context.clone();
    running(&taken_in(call, &content_type, &context, options).await?)
}

/// Takes the body in, and begins to make an image of it.
async fn taken_in(
    call: Call,
    content_type: &str,
    context: &Context,
    mut options: ImageOptions,
) -> Result<LiveOperation> {
    let upload = call.engine().image_upload(context, call.project())?;
    let engine = call.engine().clone();
    let project = call.project().to_owned();
    let target =
        Target { engine: engine.clone(), context: context.clone(), project: project.clone(), upload };
    let body = call.request.into_body();
    let parts = if content_type.starts_with("multipart/form-data") {
        split(body, &boundary(content_type)?, &target, &mut options).await
    } else {
        let part = if options.disk.is_some() { ImagePart::Disk } else { ImagePart::Unified };
        whole(body, &target, part).await
    }?;
    engine.image_import(context, &project, target.upload, parts, options).await
}

/// An image that another server brings, for whoever made the secret. Who brings it can wait for the operation by another one.
async fn pushed(call: Call, content_type: &str, admitted: Admitted) -> Result<Reply> {
    let engine = call.engine().clone();
    let operation = taken_in(call, content_type, &admitted.context, admitted.options).await?;
    let record = operation.snapshot();
    let mut metadata = record.metadata.clone();
    metadata.insert("secret".into(), engine.image_came(admitted.context, record.id).into());
    let view = OperationView::of(&record).with_metadata_if(Some(&metadata));
    accepted(&record.id.to_string(), &view)
}

struct Target {
    engine: karst_engine::Engine,
    context: Context,
    project: String,
    upload: ImageUpload,
}

impl Target {
    async fn open(&self, part: ImagePart) -> Result<Sink> {
        let upload = self.engine.image_upload_part(&self.context, &self.project, &self.upload, part).await?;
        let stream = Stream::new(upload.file.try_clone()?)?;
        Ok(Sink { stream, upload, written: 0 })
    }
}

/// A part that is written, and no more of it than the host takes.
struct Sink {
    stream: Stream,
    upload: PartUpload,
    written: u64,
}

impl Sink {
    async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.written += data.len() as u64;
        self.upload.check(self.written)?;
        Ok(self.stream.write_all(data).await?)
    }

    async fn end(mut self) -> Result<()> {
        Ok(self.stream.flush().await?)
    }
}

async fn whole(mut body: request::RequestBody, target: &Target, part: ImagePart) -> Result<Vec<ImagePart>> {
    let mut sink = target.open(part).await?;
    let mut any = false;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| Error::invalid("body", "the body of the request broke off").with_context(e))?;
        if let Ok(data) = frame.into_data() {
            any |= !data.is_empty();
            sink.write(&data).await?;
        }
    }
    sink.end().await?;
    if !any {
        return Err(Error::invalid("body", "the image is empty"));
    }
    Ok(vec![part])
}

async fn split(
    body: request::RequestBody,
    boundary: &str,
    target: &Target,
    options: &mut ImageOptions,
) -> Result<Vec<ImagePart>> {
    let source = futures::stream::unfold(body, |mut body| async move {
        loop {
            match body.frame().await? {
                Ok(frame) => {
                    if let Ok(data) = frame.into_data() {
                        return Some((Ok(data), body));
                    }
                }
                Err(e) => {
                    let e = Error::invalid("body", "the body of the request broke off").with_context(e);
                    return Some((Err(e), body));
                }
            }
        }
    });
    let mut multipart = Multipart::new(source, boundary);
    let mut parts = vec![];
    while let Some((name, filename)) = multipart.part().await? {
        let part = match name.as_str() {
            "metadata" => ImagePart::Metadata,
            "rootfs" => ImagePart::Rootfs,
            "rootfs.img" => ImagePart::Disk,
            other => {
                return Err(Error::invalid(
                    other,
                    format!("{other:?} is not a part of an image; metadata, rootfs and rootfs.img are"),
                ));
            }
        };
        if parts.contains(&part) || (part == ImagePart::Metadata) != parts.is_empty() {
            return Err(Error::invalid(name, "an image is uploaded as metadata, then rootfs or rootfs.img"));
        }
        let mut sink = target.open(part).await?;
        while let Some(data) = multipart.data().await? {
            sink.write(&data).await?;
        }
        sink.end().await?;
        if let (true, Some(f)) = (part != ImagePart::Metadata, filename) {
            options.filename = f;
        }
        parts.push(part);
    }
    if parts.len() != 2 {
        return Err(Error::invalid("rootfs", "the image has no rootfs"));
    }
    Ok(parts)
}

fn target_of(call: &Call, alias: &ImageAlias) -> String {
    call.engine()
        .inner()
        .inventory
        .read()
        .images
        .get(&alias.image)
        .map(|i| i.fingerprint.clone())
        .unwrap_or_default()
}

/// `GET /1.0/images/aliases`
///
/// # Errors
/// Those of the engine.
pub async fn aliases(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().image_aliases_shown(&call.context, call.project(), None)?;
    let targets: Vec<String> = all.iter().map(|a| target_of(&call, a)).collect();
    respond_list(
        recursion,
        &filter,
        all.iter()
            .zip(&targets)
            .map(|(a, t)| (AliasView::of(a, t), wire::path("images/aliases", &a.name, call.project()))),
    )
}

fn find_alias(call: &Call) -> Result<Row<ImageAlias>> {
    let kind = call.query.get("type").map(|t| InstanceKind::parse("type", t)).transpose()?;
    call.engine().image_alias_shown(&call.context, call.project(), call.param(0), kind)
}

/// Aliases carry no version: their tag is one of what they say.
fn alias_tag(alias: &ImageAlias) -> Etag {
    let mut id = uuid::Uuid::new_v5(&alias.image.uuid(), alias.name.as_bytes());
    id = uuid::Uuid::new_v5(&id, alias.description.as_bytes());
    Etag::of(ALIAS_VIEW, id, 0)
}

/// `GET /1.0/images/aliases/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn alias(call: Call) -> Result<Reply> {
    let alias = find_alias(&call)?;
    sync_etag(&AliasView::of(&alias, &target_of(&call, &alias)), &alias_tag(&alias))
}

/// `POST /1.0/images/aliases`
///
/// # Errors
/// Those of the engine.
pub async fn create_alias(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let name = f.need_text("name")?;
    let target = f.need_text("target")?;
    let description = f.text("description")?.unwrap_or_default();
    f.finish(&["type"])?;
    call.engine().image_alias_create(&call.context, call.project(), &name, &description, &target).await?;
    created(&wire::path("images/aliases", &name, call.project()))
}

/// `PUT` and `PATCH /1.0/images/aliases/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn change_alias(call: Call) -> Result<Reply> {
    let alias = find_alias(&call)?;
    alias_tag(&alias).demand(call.header("if-match"))?;
    let patch = call.request.method() == hyper::Method::PATCH;
    let (call, mut f) = call.fields().await?;
    let (mut description, target) = (f.text("description")?, f.text("target")?.filter(|t| !t.is_empty()));
    f.finish(&["name", "type"])?;
    if !patch {
        if target.is_none() {
            return Err(Error::invalid("target", "target is missing"));
        }
        description = Some(description.unwrap_or_default());
    }
    let name = call.param(0);
    call.engine()
        .image_alias_update(&call.context, call.project(), name, description.as_deref(), target.as_deref())
        .await?;
    Ok(empty())
}

/// `POST /1.0/images/aliases/{name}`: rename.
///
/// # Errors
/// Those of the engine.
pub async fn rename_alias(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    f.finish(&[])?;
    call.engine().image_alias_rename(&call.context, call.project(), call.param(0), &new).await?;
    created(&wire::path("images/aliases", &new, call.project()))
}

/// `DELETE /1.0/images/aliases/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete_alias(call: Call) -> Result<Reply> {
    call.engine().image_alias_delete(&call.context, call.project(), call.param(0)).await?;
    Ok(empty())
}

/// `POST /1.0/karst/images/build`: builds an image of a recipe.
///
/// # Errors
/// Those of the engine.
pub async fn build(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let recipe = f.need_text("recipe")?;
    let kind = InstanceKind::parse("type", &f.text("type")?.unwrap_or_else(|| "container".into()))?;
    let aliases = match (f.texts("aliases")?, f.text("alias")?) {
        (Some(list), one) => list.into_iter().chain(one).map(|n| (n, String::new())).collect(),
        (None, Some(one)) => vec![(one, String::new())],
        (None, None) => vec![],
    };
    let options = ImageOptions {
        aliases,
        move_aliases: true,
        public: f.flag("public")?,
        properties: f.config("properties")?.unwrap_or_default(),
        ..Default::default()
    };
    f.finish(&[])?;
    let operation = call.engine().image_build(&call.context, call.project(), &recipe, kind, options).await?;
    running(&operation)
}
