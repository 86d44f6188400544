//! Backups of instances and of custom volumes: made, listed, fetched; and uploads that become instances, volumes and
//! discs.

use super::{
    files::frames,
    list as respond_list,
    snapshots::{Place, ended, time},
    volumes::demand_custom,
};
use crate::{
    app::{Call, running},
    filter::Filter,
    request,
    respond::{Etag, Reply, stream, sync_etag},
    stream::Stream,
    wire,
};
use http_body_util::BodyExt;
use hyper::{
    Response,
    header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue},
};
use jiff::Timestamp;
use karst_engine::{
    Engine,
    backups::{
        create::CreateBackup,
        import::{ImportInstance, ImportVolume},
    },
};
use karst_model::{
    BackupId, Error, Result,
    backup::{Backup, BackupOwner, Compression},
};
use serde::Serialize;
use tokio::io::AsyncWriteExt;

const VIEW: &str = "backup";

/// A backup; the fields of both kinds of owner.
#[derive(Serialize)]
struct View<'a> {
    name: &'a str,
    created_at: Timestamp,
    #[serde(serialize_with = "wire::time")]
    expires_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_only: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_only: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_only: Option<bool>,
    optimized_storage: bool,
}

impl<'a> View<'a> {
    fn of(backup: &'a Backup) -> Self {
        let instance = matches!(backup.owner, BackupOwner::Instance { .. }).then_some(backup.instance_only);
        Self {
            name: &backup.name,
            created_at: backup.created_at,
            expires_at: backup.expires_at,
            instance_only: instance,
            container_only: instance,
            volume_only: instance.is_none().then_some(backup.instance_only),
            optimized_storage: false,
        }
    }
}

/// `GET …/backups`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let place = Place::of(call.project(), &call.params)?;
    let all = call.engine().backups(&call.context, place.origin())?;
    respond_list(recursion, &filter, all.iter().map(|b| (View::of(b), place.path_in("backups", &b.name))))
}

/// `GET …/backups/{backup}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    let backup = call.engine().backup(&call.context, place.origin(), &place.snapshot)?;
    sync_etag(&View::of(&backup), &Etag::of(VIEW, backup.id.uuid(), backup.spec_version))
}

/// `POST …/backups`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn create(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    let (call, mut f) = call.fields().await?;
    if f.flag("optimized_storage")? {
        return Err(Error::unsupported(
            "streams of storage drivers are not made here; leave --optimized-storage out",
        )
        .at("optimized_storage"));
    }
    // Of old clients; each of them says the same.
    let without_snapshots = f.flag("instance_only")? | f.flag("container_only")? | f.flag("volume_only")?;
    let compression = f.text("compression_algorithm")?.filter(|c| !c.is_empty());
    let request = CreateBackup {
        name: f.text("name")?,
        expires_at: time(&mut f, "expires_at")?.flatten(),
        without_snapshots,
        compression: compression.map(|c| Compression::parse("compression_algorithm", &c)).transpose()?,
    };
    f.finish(&["created_at"])?;
    let (_, operation) = call.engine().backup_create(&call.context, place.origin(), request).await?;
    running(&operation)
}

/// `POST …/backups/{backup}`: rename.
///
/// # Errors
/// Those of the engine.
pub async fn rename(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    f.finish(&[])?;
    call.engine().backup_rename(&call.context, place.origin(), &place.snapshot, &new).await?;
    ended(&call.app.engine, &call.context, &place, "Renaming backup", ("backups", "backups"), &new)
}

/// `DELETE …/backups/{backup}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    running(&call.engine().backup_delete(&call.context, place.origin(), &place.snapshot).await?)
}

/// `GET …/backups/{backup}/export`: the file.
///
/// # Errors
/// Those of the engine.
pub async fn export(call: Call) -> Result<Reply> {
    let place = Place::of(call.project(), &call.params)?;
    let opened = call.engine().backup_open(&call.context, place.origin(), &place.snapshot).await?;
    let fd = opened.fds.into_iter().next();
    let fd = fd.ok_or_else(|| Error::internal("the host opened no file", &place.snapshot))?;
    let mut reply = Response::new(stream(frames(vec![Err(Stream::new(fd)?)])));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(opened.value.size));
    if let Ok(v) = HeaderValue::from_str(&format!("inline;filename={}.backup", place.snapshot)) {
        headers.insert(CONTENT_DISPOSITION, v);
    }
    Ok(reply)
}

/// Is the body a file to be imported?
pub(super) fn is_upload(call: &Call) -> bool {
    call.header(CONTENT_TYPE.as_str()) == Some("application/octet-stream")
}

/// A file on its way to the host: dropped there when what was to become of it cannot.
struct Upload {
    engine: Engine,
    id: BackupId,
}

impl Upload {
    async fn take(call: Call) -> Result<(Self, crate::app::Taken)> {
        let engine = call.engine().clone();
        let id = engine.backup_upload(&call.context, call.project())?;
        let upload = Self { engine, id };
        let fd = upload.engine.backup_upload_open(&call.context, call.project(), id).await?;
        let Call { app, context, certificate, params, query, request } = call;
        match store(request.into_body(), Stream::new(fd)?).await {
            Ok(()) => Ok((upload, crate::app::Taken { app, context, certificate, params, query })),
            Err(e) => upload.abandon(e).await,
        }
    }

    async fn abandon<T>(self, e: Error) -> Result<T> {
        self.engine.backup_upload_abandon(self.id).await;
        Err(e)
    }
}

async fn store(mut body: request::RequestBody, mut sink: Stream) -> Result<()> {
    let mut any = false;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| Error::invalid("body", "the body of the request broke off").with_context(e))?;
        if let Ok(data) = frame.into_data() {
            any |= !data.is_empty();
            sink.write_all(&data).await?;
        }
    }
    sink.flush().await?;
    if !any {
        return Err(Error::invalid("body", "the file is empty"));
    }
    Ok(())
}

/// `POST /1.0/instances` with a file: an instance of a backup.
///
/// # Errors
/// Those of the engine.
pub(super) async fn import_instance(call: Call) -> Result<Reply> {
    let text = |name: &str| call.incus_header(name).filter(|v| !v.is_empty()).map(str::to_owned);
    let (name, pool) = (text("name"), text("pool"));
    for name in ["config", "devices"] {
        if text(name).is_some() {
            return Err(Error::unsupported("a backup is imported as it is; change the instance afterwards")
                .at(format!("X-Incus-{name}")));
        }
    }
    let (upload, call) = Upload::take(call).await?;
    let request = ImportInstance { upload: upload.id, name, pool };
    match call.engine().instance_import(&call.context, call.project(), request).await {
        Ok(operation) => running(&operation),
        Err(e) => upload.abandon(e).await,
    }
}

/// `POST /1.0/storage-pools/{name}/volumes/custom` with a file: a volume of a backup, or a disc.
///
/// # Errors
/// Those of the engine.
pub(super) async fn import_volume(call: Call) -> Result<Reply> {
    demand_custom(match call.param(1) {
        "" => "custom",
        kind => kind,
    })?;
    let text = |name: &str| call.incus_header(name).filter(|v| !v.is_empty()).map(str::to_owned);
    let name = text("name");
    let disc = match text("type").as_deref() {
        None | Some("backup") => false,
        Some("iso") if name.is_none() => return Err(Error::invalid("X-Incus-name", "a disc needs a name")),
        Some("iso") => true,
        Some(other) => {
            return Err(Error::invalid(
                "X-Incus-type",
                format!("{other:?} is not a kind of file; backup and iso are"),
            ));
        }
    };
    let (upload, call) = Upload::take(call).await?;
    let request = ImportVolume { upload: upload.id, name, disc };
    match call.engine().volume_import(&call.context, call.project(), call.param(0), request).await {
        Ok(operation) => running(&operation),
        Err(e) => upload.abandon(e).await,
    }
}
